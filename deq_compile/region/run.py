"""A region at run time. Forward: solve, verify or keep, record. Backward: an adjoint, or the loop's own gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.device import on_gpu
from deq_compile.kernels.iteration import CONVERGED, MAX_ITER

from . import backwards, graphs, records
from .adjoint import AdjointSolution, preceding
from .backward import BACKWARDS, AdjointCall, Backward, Settled, of_steps
from .backwards.reuse import skipped_pairs
from .body import Deferred, Linearised, Runner
from .call import Call, problem_of, raising_of, runner_of
from .comparison import compare, compare_call
from .forward import Solution, or_plain, solve
from .kept import OwnLoop, Trajectory, loop_gradient, own_loop
from .pool import Recycled, Way
from .reversal import Trail, reversed_gradient
from .site import Site
from .solvers import SOLVERS
from .solvers.reversible import ReversibleProgress
from .stop import any_of
from .stopwatch import Stopwatch, TimedLinearised
from .verdict import count_misses, gradient_is_the_loops, loops_own_is_due, warn_of_gradient
from .warm import Start, remember
from .worth import weigh

__all__ = ["BackwardInputs", "Forward", "Result", "SavedForBackward", "Ticket", "adjoint", "backwards", "run", "run_backward",
           "run_forward"]  # fmt: skip

OPEN_CAP = 1000  # plain iterations for a solve that missed, where the user's loop has no cap and the fixed point is meant


@dataclasses.dataclass
class SavedForBackward:
    """What a forward leaves for its backward beside tensors. Where it does not arrive there, nothing is lost but time.

    linear   the body linearised at the fixed point, where the last evaluation gave that too
    loop     the body linearised at every iterate of a loop that was kept
    factors  of the solve, where the adjoint makes use of them
    recycled what earlier batches have left for the adjoint; warm: the last adjoint
    trail    the steps of a reversible iteration
    settled  by the first backward
    """

    linear: Linearised | None = None
    loop: Sequence[Linearised] = ()
    factors: Factors | None = None
    recycled: Recycled | None = None
    warm: Start | None = None
    trail: Trail | None = None
    settled: Settled = dataclasses.field(default_factory=Settled)


class Ticket(NamedTuple):
    """What goes from a forward to its backward as numbers.

    kept    iterations of the loop (or NO_ITERATIONS) where its own result was given, 0 elsewhere
    rows    whether dimension 0 of the state is a batch
    serial  of the records; 0: nobody recorded
    number  of what the first backward settles, where a copy of the ticket may arrive there; 0: it hangs on the ticket alone
    """

    kept: int
    rows: bool
    serial: int
    number: int = 0


@dataclasses.dataclass
class Result:
    """What a call came to: its flat state z (B, D), by a solution or, where that is None, by the user's own loop. `given` is what
    goes out: z, or f(z) where the user's code applies the body once more."""

    z: Tensor
    given: Tensor
    solution: Solution | None
    own: OwnLoop | None
    kept: int
    serial: int
    saved: SavedForBackward

    def solve_info(self) -> Tensor:
        """(B, 3) float32: the stopping residual and the iterations of each sample, and its status; of the user's own loop the
        iterations, whether a test ended it, and no residual."""
        if self.solution is not None:
            return self.solution.solve_info()
        assert self.own is not None
        status, made = CONVERGED if self.own.passed else MAX_ITER, max(self.own.iterations, 0)
        row = self.z.new_tensor((-1.0, made, status), dtype=torch.float32)
        return row.repeat(self.z.shape[0], 1)


@dataclasses.dataclass
class Forward:
    """What one forward gives: fresh state tensors, `about` (see `Result`), and what it leaves. `held` is the flat state in one
    dimension, for the backward: who gets `states` may change them in place."""

    states: list[Tensor]
    ticket: Ticket
    solve_info: Tensor
    saved: SavedForBackward
    held: Tensor | None = None


def run_forward(site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]) -> Forward:
    """Solve a region, or run its loop."""
    call = Call(site, state0, operands, sizes)
    found, grad = run(call), site.spec.grad
    weigh(site, found)
    states = call.layout.outputs(found.given, fresh=grad)
    ticket = Ticket(found.kept, call.rows, found.serial)
    done = Forward(states, ticket, found.solve_info(), found.saved, found.z.reshape(-1) if grad else None)
    if call.watch is not None:
        records.add_seconds(found.serial, call.watch.read())
    return done


def run(call: Call) -> Result:
    """One call: solve, verify or keep, record."""
    site = call.site
    first, due = _solve(call)
    everywhere = first is not None and call.layout.batch > 0 and not on_gpu(call.z0.device) and first.all_converged()
    linear, image = (call.evaluations.linear(), call.evaluations.value()) if everywhere else (None, _enqueued(call, first, due))
    own: OwnLoop | None = None
    if due:
        assert first is not None
        own = call.own(linearised=False)
        site.compared(first.evaluations)
        solution = compare(site, first, own, call.z0, call.rows, call.solved)
    else:
        solution = _verified(call, first, everywhere)
    if solution is not None and of_steps(site.spec.config) and trail_of(solution) is None:
        solution = call.solved(call.z0, site.tol)  # a comparison went on from where the steps had ended
    site.calls += call.layout.batch > 0
    if solution is None:
        own = own or call.own(linearised=True)
        z, saved, kept = own.z, SavedForBackward(loop=own.linears), own.iterations
        given = z
    else:
        z, kept = solution.z, 0
        if first is None or z is not first.z:
            linear = image = None
        given = _given(call, z, image)
        known = None if site.warm is None else site.warm.last
        trail = trail_of(solution) if site.spec.grad else None
        saved = SavedForBackward(linear, (), _factors(site, solution, call.recycled), call.recycled, known, trail)
        remember(site, call, z)
    serial = 0 if call.inside else _record(call, solution, z, saved.factors, kept)
    return Result(z, given, solution, own, kept, serial, saved)


def trail_of(solution: Solution) -> Trail | None:
    """The steps that led to a solution; None where they are not reversible, or have not led there."""
    progress = solution.progress
    if not isinstance(progress, ReversibleProgress) or solution.z is not progress.z_best:
        return None
    return Trail.of(progress)


def _enqueued(call: Call, first: Solution | None, due: bool) -> Tensor | None:
    """The attached step of a captured solve, (B, D), before anybody waits to hear what the solve came to: in vain where that is a
    miss, and else the device is not idle while the host asks. None where there is none, or where it would be compared first."""
    ahead = first is not None and first.outcome is not None and call.site.spec.attached and not due
    return call.body(first.z) if ahead and first is not None else None


def _given(call: Call, z: Tensor, image: Tensor | None) -> Tensor:
    """What goes out for the fixed point z (B, D). The attached step of the user's brings it nearer by one contraction, and what
    the model and its loss make of it: on published models their gradients were up to 30 times further off without it."""
    if not call.site.spec.attached:
        return z
    return (call.body(z) if image is None else image).to(z.dtype)


def _solve(call: Call) -> tuple[Solution | None, bool]:
    """The solve, unless the loop is kept; and whether it is to be compared with the loop."""
    site = call.site
    due = site.due() and not call.inside
    first = call.first(due) if due or site.verdict != "kept" else None
    return first, due or (first is not None and not call.inside and site.unusual(first.evaluations))


def _verified(call: Call, first: Solution | None, everywhere: bool) -> Solution | None:
    """The solution to go on with at a call that is not compared with the loop; None: the user's own loop is to be run."""
    site = call.site
    if first is None or call.inside:
        return first
    if first.outcome is None and site.call_due():
        return _where_it_missed(call, compare_call(site, first, call.z0, call.rows, call.solved))
    if everywhere:
        site.misses = 0
        return first
    return _where_it_missed(call, first)


def _where_it_missed(call: Call, solution: Solution) -> Solution | None:
    """The solution to go on with where not every sample is known to have converged; None where the user's own loop has to be
    run. A captured solve with a loop behind it is not waited for: what it came to is asked at a later call."""
    site, spec = call.site, call.site.spec
    cap = spec.own_loop_cap
    if solution.outcome is not None and (cap is not None or spec.iterations is not None):
        site.pending.append(solution.without_tensors())
        return solution
    if not solution.missed():
        site.misses = 0
        return solution
    if cap is None and not of_steps(spec.config):
        config = spec.config
        most = max(config.max_iter, spec.iterations or min(spec.own_cap or 1, OPEN_CAP))
        relative = config.stop_mode == "rel"
        solution = or_plain(solution, call.body, call.z0, cap=most, tol=site.tol, relative=relative, stop=call.stop)
    missed = count_misses(site, solution)
    return None if missed and cap is not None else solution


def _factors(site: Site, solution: Solution, recycled: Recycled | None) -> Factors | None:
    """What the backward is going to use of a solve."""
    due = site.reuse_due() or (recycled is not None and recycled.due)
    wanted = site.spec.stores_steps and (site.reuses or due)
    return solution.state.alone() if wanted and solution.state is not None else None


def _record(call: Call, solution: Solution | None, z: Tensor, factors: Factors | None, iterations: int) -> int:
    """The serial number of the records of a call; 0: nobody listens."""
    if not records.recording():
        return 0
    site, status = call.site, "kept" if solution is None else call.site.solving
    record = records.SolveRecord(site.key, status, evaluations=call.evaluations.count, where=site.spec.where)
    record.z = z.detach().clone() if records.wants_tensors() else None
    if factors is not None:
        record.bytes = sum(t.numel() * t.element_size() for t in (factors.S, factors.C))
    if solution is None:
        record.iterations = record.iterations_max = max(iterations, 0)
    elif z.numel():
        record.describe(solution)
    return records.open_record(record)


class BackwardInputs(NamedTuple):
    """What a forward's backward gets to see.

    states    the flat state in one dimension, or the state tensors
    state0, operands, sizes  as the forward was given them
    ticket, saved  as the forward made them; `saved` is empty where it got lost
    """

    states: Sequence[Tensor]
    state0: Sequence[Tensor]
    operands: Sequence[Tensor]
    sizes: Sequence[int]
    ticket: Ticket
    saved: SavedForBackward


def run_backward(
    site: Site, cotangents: Sequence[Tensor | None], inputs: BackwardInputs, needs: tuple[bool, ...]
) -> tuple[list[Tensor] | None, list[Tensor | None]]:
    """Gradients of the initial state (None: zero) and of the operands marked in `needs`."""
    serial = inputs.ticket.serial
    watch = Stopwatch() if serial and records.wants_timing() else None
    try:
        return _Backward(site, cotangents, inputs, needs, watch).gradients()
    finally:
        if watch is not None:
            records.add_seconds(serial, watch.read())


class _Backward:
    """One backward of one region."""

    def __init__(
        self, site: Site, cotangents: Sequence[Tensor | None], inputs: BackwardInputs, needs: tuple[bool, ...],
        watch: Stopwatch | None,
    ) -> None:  # fmt: skip
        spec, linear = site.spec, inputs.saved.linear
        self.site, self.inputs, self.needs, self.watch = site, inputs, needs, watch
        self.layout = spec.layout([s.shape for s in inputs.state0], inputs.ticket.rows)
        given = [
            torch.zeros(s.shape, dtype=dtype, device=s.device) if c is None else c
            for s, dtype, c in zip(inputs.state0, spec.dtypes, cotangents, strict=True)
        ]
        self.q = self.layout.matrix(given)
        self.runner: Runner
        self.operands: Sequence[Tensor]
        if linear is not None and linear.source is not None:
            self.runner, self.operands = linear.source
        else:
            self.operands = spec.arranged(inputs.operands)
            self.runner = runner_of(site, self.layout, self.operands, inputs.sizes)
        self.inside = graphs.capturing()

    def gradients(self) -> tuple[list[Tensor] | None, list[Tensor | None]]:
        site, spec, kept = self.site, self.site.spec, self.inputs.ticket.kept
        mode = BACKWARDS[spec.config.backward]
        if kept or mode.gradient == "loop":
            linears = self.inputs.saved.loop if kept and self.needs == spec.needs else ()
            return self._loops_own(kept or spec.iterations or spec.config.max_iter, linears)
        if mode.gradient == "iteration":
            return self._steps_own()
        self.z = self.layout.held(self.inputs.states)
        # Not a closure over self: what a backward holds has to go when it ends, so that its memory, still warm, is used again.
        self.deferred = Deferred(functools.partial(self.runner.linearise, self.z, self.operands, self.needs))
        saved = self.inputs.saved
        known = self.deferred.found = saved.linear if self.needs == spec.needs else None
        linear: Linearised = known or self.deferred
        if self.watch is not None:
            linear = TimedLinearised(self.deferred.get(), self.watch)
        settled, left = saved.settled, (saved.recycled, saved.warm)
        call = AdjointCall(site, saved.factors, self.inside, self._factors_again, self._captured, *left, settled)
        if self.inside or not loops_own_is_due(site, settled):  # inside nothing may be asked of the device
            first = not settled.done
            found = adjoint(mode, linear, self.q, call, self.inputs.ticket.serial, self.watch)
            if self.inside or gradient_is_the_loops(site, linear, found, settled if first else None):
                return None, found.payload
        stop = any_of(spec.own_tests, self.layout, (*self.operands, *self.inputs.sizes))
        f = self.runner.evaluations(self.operands, None)
        return self._loops_own(spec.iterations or own_loop(spec, f, self._start(), stop).iterations)

    def _start(self) -> Tensor:
        return self.layout.flatten(self.inputs.state0).detach()

    def _loops_own(self, count: int, linears: Sequence[Linearised] = ()) -> tuple[list[Tensor] | None, list[Tensor | None]]:
        """The gradient of `count` iterations of the user's own loop."""
        z0 = self.layout.flatten(self.inputs.state0)
        memory = self.site.spec.config.loop_memory
        w, grads = loop_gradient(Trajectory(self.runner, z0, self.operands, self.needs, count, memory, linears), self.q)
        if serial := self.inputs.ticket.serial:
            records.complete(serial, cotangent=self.q, w=self.q, vjps=max(count, 0), adjoint_message="the loop's own gradient")
        return self.layout.unflatten(w), grads

    def _steps_own(self) -> tuple[list[Tensor] | None, list[Tensor | None]]:
        """The gradient of the solver's own steps."""
        trail = self.inputs.saved.trail or trail_of(self._solved_again())
        assert trail is not None
        found = reversed_gradient(
            trail, self._start(), self.q, self.runner, self.operands, self.needs, attached=self.site.spec.attached
        )
        if serial := self.inputs.ticket.serial:
            records.complete(serial, cotangent=self.q, w=self.q, vjps=found.products, adjoint_message=found.message)
        return self.layout.unflatten(found.start), found.operands

    def _captured(self, way: Way) -> AdjointSolution | None:
        """The captured adjoint for these shapes, on a GPU and from the second call on."""
        way = dataclasses.replace(way, shared=preceding(way.factors, way.shared))
        site, config = self.site, self.site.spec.config
        tol = self.inputs.saved.settled.tolerance(site)
        settings = graphs.AdjointSettings(tol, max(1, config.backward_max_iter), site.spec.body_eps, skipped_pairs(site))
        graphs.end_with(site)
        key = (site.key, *self.inputs.sizes)
        captured = graphs.captured_adjoint(key, self.runner, self.z, self.operands, self.needs, way, settings, config.engine)
        if captured is None or (solved := captured.solve(self.z, self.q, self.operands, way)) is None:
            return None
        found, self.deferred.found = solved
        return dataclasses.replace(found, captured=True, reused=way.factors is not None, recycled=way.shared is not None)

    def _factors_again(self) -> Factors | None:
        """The factors of a forward whose own did not arrive."""
        state = self._solved_again().state
        return None if state is None else state.alone()

    def _solved_again(self) -> Solution:
        """The solve of the forward once more, where what it left did not arrive."""
        spec, operands = self.site.spec, self.operands
        stop = any_of(spec.stop, self.layout, (*operands, *self.inputs.sizes))
        problem = problem_of(self.site, watched=not self.inside, stop=stop)
        f = self.runner.evaluations(operands, None)
        raising = raising_of(self.site, self.inside, own=True)
        return solve(f, self._start(), problem, solver=SOLVERS[spec.config.solver], raising=raising)


def adjoint(
    mode: Backward, linear: Linearised, q: Tensor, call: AdjointCall, serial: int, watch: Stopwatch | None = None
) -> AdjointSolution:
    """The adjoint by a backward mode for cotangents q (B, D), recorded; a miss that no loop stands behind is warned of."""
    found = (mode.solve if watch is None else watch.timed("solver", mode.solve))(linear, q, call)
    if serial:
        records.complete_adjoint(serial, q, found, call.site.gradient_error)
    if not call.inside:
        warn_of_gradient(call.site, found)
    return found
