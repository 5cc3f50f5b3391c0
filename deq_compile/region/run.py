"""A region at run time: forward (solve, verify, or the loop as it was) and backward (adjoint, or the loop's gradient)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.device import on_gpu

from . import engine, records
from .adjoint import AdjointSolution, jacobian_free, phantom, solve_adjoint
from .body import Linearised, Runner, runner_for
from .forward import Solution, better_of, solve
from .kept import iterate, iterate_and_linearise, loop_gradient, own_iterations
from .layout import Layout
from .site import Site
from .status import converged, message_of
from .stop import any_of
from .stopwatch import Stopwatch, TimedLinearised
from .verdict import count_misses, decide_rows, declared_gradient_holds, gradient_is_the_loops, settle, verify
from .worth import factors_pay

log = logging.getLogger("deq_compile.region")


@dataclasses.dataclass
class Left:
    """What a forward leaves for its backward beside tensors. Where it does not arrive there, nothing is lost but time.

    linear   the body linearised at the fixed point, where the last evaluation gave that too
    loop     the body linearised at every iterate of a loop that was kept
    factors  of the solve, where the adjoint makes use of them
    """

    linear: Linearised | None = None
    loop: Sequence[Linearised] = ()
    factors: Factors | None = None


@dataclasses.dataclass
class Forward:
    """What one forward gives: fresh state tensors, whether the loop was kept, over which rows, and what it leaves. `about` is
    (B, 2) float32: the stopping residual and the iterations of each sample, -1 for a loop that was kept. `held` is the flat state
    in one dimension, for the backward: who gets `states` may change them in place."""

    states: list[Tensor]
    kept: bool
    rows: bool
    serial: int
    about: Tensor
    left: Left
    held: Tensor | None = None


def run_forward(site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]) -> Forward:
    """Solve a region, or run its loop."""
    spec, config = site.spec, site.spec.config
    inside = engine.under_capture(site, state0)
    watch = Stopwatch() if records.wants_timing() else None
    if not inside:
        settle(site)
    operands = spec.arranged(operands)
    rows = decide_rows(site, state0, operands, sizes)
    layout, runner = _prepared(site, state0, rows, operands, sizes)
    z0 = layout.matrix(state0)
    if z0.requires_grad:
        z0 = z0.detach()
    # The last evaluation is at the fixed point: with what it saves the backward need not evaluate once more.
    saves = spec.grad and config.solver == "broyden" and config.backward != "unroll" and not spec.stop and not on_gpu(z0.device)
    evaluations = runner.evaluations(operands, spec.needs if saves else None)
    body: Callable[[Tensor], Tensor] = evaluations

    stop = any_of(spec.stop, layout, (*operands, *sizes))

    def solved(start: Tensor, tol: float, solver: str | None = None, max_iter: int | None = None) -> Solution:
        return solve_for(site, body, start, tol=tol, solver=solver, max_iter=max_iter, watched=not inside, stop=stop)

    if watch is not None:
        body, solved = watch.timed("body", body), watch.timed("solver", solved)
    due = site.due() and not inside
    solution, everywhere = None, False
    if due or site.verdict == "solve":
        captured = None if inside else _captured(site, runner, z0, operands, sizes)
        if captured is not None:
            solution = captured.solve(z0, operands, leaves=spec.stores_steps)
        if solution is None:
            solution = solved(z0, site.tol)
        everywhere = layout.batch > 0 and not on_gpu(z0.device) and solution.all_converged()
        if spec.iterations is None and not inside and not everywhere and solution.missed():
            own = spec.own_cap or config.max_iter
            solution = better_of(solution, lambda: solved(z0, site.tol, solver="picard", max_iter=own))
    first = solution
    linear = evaluations.linear() if everywhere else None
    loop = None
    if due and spec.iterations is not None and solution is not None:
        loop = iterate(body, z0, spec.iterations)
        solution = verify(site, solution, loop, solved)
    elif inside:
        pass
    elif everywhere:
        site.misses = 0
    elif solution is not None and solution.outcome is None:
        count_misses(site, solution)
    elif solution is not None:  # what it came to is asked at the next call, when the device has long been done
        site.pending = dataclasses.replace(solution, z=solution.residual, state=None)
    site.calls += layout.batch > 0
    kept = site.verdict == "kept" and (loop is not None or solution is None)
    linears: Sequence[Linearised] = ()
    if kept:
        assert spec.iterations is not None
        solution = None
        if loop is not None:
            z = loop
        elif spec.grad and spec.needs is not None and config.loop_memory is None:
            linearising = iterate_and_linearise if watch is None else watch.timed("body", iterate_and_linearise)
            z, linears = linearising(runner, operands, spec.needs, z0, spec.iterations)
            evaluations.count += len(linears)
        else:
            z = iterate(body, z0, spec.iterations)
    else:
        assert solution is not None
        z = solution.z
    factors = None
    if solution is not None and solution.state is not None and spec.stores_steps and (site.reuses or site.reuse_due()):
        factors = solution.state.alone()
    serial = 0 if inside else record_forward(site, solution, z, evaluations.count, factors)
    if solution is None or first is None or solution.z is not first.z:
        linear = None
    about = z.new_full((layout.batch, 2), -1.0, dtype=torch.float32) if solution is None else solution.about()
    states, held = layout.outputs(z, fresh=spec.grad), z.reshape(-1) if spec.grad else None
    done = Forward(states, kept, rows, serial, about, Left(linear, linears, factors), held)
    if watch is not None:
        records.add_seconds(serial, watch.read())
    return done


def solve_for(
    site: Site,
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    tol: float | None = None,
    solver: str | None = None,
    max_iter: int | None = None,
    watched: bool = True,
    stop: Callable[[Tensor, Tensor], bool] | None = None,
) -> Solution:
    """:func:`~.forward.solve` with a region's settings, but for those that are given."""
    config = site.spec.config
    found = solve(
        f,
        z0,
        solver=solver or config.solver,
        tol=site.tol if tol is None else tol,
        stop_mode=config.stop_mode,
        max_iter=max_iter or config.max_iter,
        memory=config.memory,
        factor_dtype=site.spec.factor_dtype,
        body_eps=site.spec.body_eps,
        room=site.room,
        watched=watched,
        anderson_memory=config.anderson_memory,
        anderson_damping=config.anderson_damping,
        stop=stop,
    )
    if found.state is not None:
        site.took(found.evaluations)
    return found


def _prepared(
    site: Site, state0: Sequence[Tensor], rows: bool, operands: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[Layout, Runner]:
    """Layout and runner for these shapes; those of the last call mostly are, and that is seen without hashing them."""
    metas = [(o.shape, o.stride(), o.dtype, o.device) for o in operands]
    facts = [s.shape for s in state0], rows, metas, list(sizes)
    prepared = site.prepared
    if prepared is None or prepared[0] != facts:
        layout = site.spec.layout(facts[0], rows)
        prepared = site.prepared = facts, layout, runner_for(site.spec.body, layout, operands, sizes)
    return prepared[1], prepared[2]


def run_backward(
    site: Site,
    cotangents: Sequence[Tensor | None],
    states: Sequence[Tensor],
    state0: Sequence[Tensor],
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    forward: tuple[bool, bool, int],
    needs: tuple[bool, ...],
    left: Left,
) -> tuple[list[Tensor] | None, list[Tensor | None]]:
    """Gradients of the initial state (None: zero) and of the operands marked in `needs`. `states` is what the forward `held`;
    `left` is empty where it got lost."""
    serial = forward[2]
    watch = Stopwatch() if serial and records.wants_timing() else None
    try:
        return _gradients(site, cotangents, states, state0, operands, sizes, forward, needs, left, watch)
    finally:
        if watch is not None:
            records.add_seconds(serial, watch.read())


def _gradients(
    site: Site, cotangents: Sequence[Tensor | None], states: Sequence[Tensor], state0: Sequence[Tensor],
    operands: Sequence[Tensor], sizes: Sequence[int], forward: tuple[bool, bool, int], needs: tuple[bool, ...], left: Left,
    watch: Stopwatch | None,
) -> tuple[list[Tensor] | None, list[Tensor | None]]:  # fmt: skip
    spec, (kept, rows, serial), linear = site.spec, forward, left.linear
    layout = spec.layout([s.shape for s in state0], rows)
    q = layout.matrix(
        [
            torch.zeros(s.shape, dtype=dtype, device=s.device) if c is None else c
            for s, dtype, c in zip(state0, spec.dtypes, cotangents, strict=True)
        ]
    )
    if linear is not None and linear.source is not None:
        runner, operands = linear.source
    else:
        operands = spec.arranged(operands)
        runner = runner_for(spec.body, layout, operands, sizes)
    if kept or spec.config.backward == "unroll":
        linears = left.loop if kept and needs == spec.needs else ()
        return loop_gradient(site, layout, runner, layout.flatten(state0), q, operands, needs, serial, linears=linears)
    z = layout.held(states)
    config = spec.config
    if needs != spec.needs:
        linear = None
    if watch is not None:
        linear = TimedLinearised(linear or runner.linearise(z, operands, needs), watch)
    found: AdjointSolution
    if config.backward == "jfb":
        linear = linear or runner.linearise(z, operands, needs)
        found = jacobian_free(linear.vjp_full, q)
    elif config.backward in ("phantom", "neumann"):
        linear = linear or runner.linearise(z, operands, needs)
        damping = config.backward_damping if config.backward == "phantom" else 1.0
        found = phantom(linear.vjp, linear.vjp_full, q, config.backward_steps, damping)
    else:
        adjoint = _adjoint if watch is None else watch.timed("solver", _adjoint)
        factors = left.factors
        if factors is None and spec.stores_steps and math.isinf(config.backward_tol):  # then the gradient is made of them
            factors = _factors_again(site, layout, runner, state0, operands, sizes)
        found, linear = adjoint(site, layout, runner, z, q, operands, sizes, needs, factors, linear)
        site.expected_vjps = found.needed
    if serial:
        records.complete_adjoint(serial, q, found)
    if engine.capturing():  # nothing may be asked of the device
        return None, found.payload
    if spec.iterations is None:
        if declared_gradient_holds(site, found):
            return None, found.payload
        z0 = layout.flatten(state0).detach()
        count = own_iterations(site, layout, runner, z0, operands, sizes)
        return loop_gradient(site, layout, runner, z0, q, operands, needs, serial, count)
    if gradient_is_the_loops(site, linear, found):
        return None, found.payload
    return loop_gradient(site, layout, runner, layout.flatten(state0).detach(), q, operands, needs, serial)


def _adjoint(
    site: Site, layout: Layout, runner: Runner, z: Tensor, q: Tensor, operands: Sequence[Tensor], sizes: Sequence[int],
    needs: tuple[bool, ...], state: Factors | None, linear: Linearised | None,
) -> tuple[AdjointSolution, Linearised]:  # fmt: skip
    """The adjoint solve with the forward's factors, captured where that is possible; and the body linearised at z."""
    spec, config = site.spec, site.spec.config
    max_iter = max(1, config.backward_max_iter)
    skip = 2 if config.memory < config.max_iter else 0  # a restart may have left two pairs that are not exact
    inside = engine.capturing()
    # Asked on a CPU only: elsewhere the matrix products run ahead of the host, and the factors' cost is another.
    asks = state is not None and not inside and not math.isinf(config.backward_tol) and not on_gpu(z.device)
    due = asks and site.reuse_due()
    if asks and not (due or site.reuses):
        state = None
    if on_gpu(z.device) and not math.isinf(config.backward_tol) and not inside:
        settings = engine.AdjointSettings(config.backward_tol, max_iter, spec.body_eps, skip)
        captured = engine.captured_adjoint((site.key, *sizes), runner, z, operands, needs, state, settings, config.engine)
        if captured is not None and (solved := captured.solve(z, q, operands, state)) is not None:
            return solved
    linear = linear or runner.linearise(z, operands, needs)
    site.backwards += 1
    vjp, vjp_full, tol, eps = linear.vjp, linear.vjp_full, config.backward_tol, spec.body_eps

    def attempt(factors: Factors | None) -> AdjointSolution:
        return solve_adjoint(
            vjp, vjp_full, q, factors, tol=tol, max_iter=max_iter, expected=site.expected_vjps, body_eps=eps, skip=skip,
            watched=not inside,
        )  # fmt: skip

    found = attempt(state)
    if due and state is not None and q.numel():
        site.reuse(factors_pay(vjp, q, state, found, tol=tol, max_iter=max_iter, body_eps=eps))
        if not site.reuses:  # this very call's gradient is that of the calls after it
            found = attempt(None)
    return found, linear


def _factors_again(
    site: Site, layout: Layout, runner: Runner, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]
) -> Factors | None:
    """The factors of a forward whose own did not arrive: the same solve once more."""
    z0, stop = layout.matrix(state0).detach(), any_of(site.spec.stop, layout, (*operands, *sizes))
    state = solve_for(site, runner.evaluations(operands, None), z0, watched=not engine.capturing(), stop=stop).state
    return None if state is None else state.alone()


def _captured(
    site: Site, runner: Runner, z0: Tensor, operands: Sequence[Tensor], sizes: Sequence[int]
) -> engine.CapturedForward | None:
    """The captured solve of this region for these shapes, on a GPU and from the second call on."""
    config = site.spec.config
    # A test of the user's own is a question to the host in every iteration.
    if config.solver != "broyden" or config.engine == "loop" or site.spec.stop or not on_gpu(z0.device):
        return None
    settings = engine.ForwardSettings(
        site.tol, config.stop_mode, config.max_iter, config.memory, site.spec.factor_dtype, site.spec.body_eps
    )
    found = engine.captured_forward((site.key, *sizes), runner, z0, operands, settings, config.engine)
    if found is not None:
        site.use(found.name, found.reason)
    return found


def record_forward(site: Site, solution: Solution | None, z: Tensor, evaluations: int, factors: Factors | None) -> int:
    if not records.recording():
        return 0
    record = records.SolveRecord(site.key, "kept" if solution is None else "solve", evaluations=evaluations)
    record.z = z.detach().clone() if records.wants_tensors() else None
    if factors is not None:
        record.bytes = sum(t.numel() * t.element_size() for t in (factors.S, factors.C))
    if solution is None:
        record.iterations = record.iterations_max = site.spec.iterations or 0
    elif z.numel():
        record.iterations = float(solution.iterations.double().mean())
        record.iterations_max = int(solution.iterations.max())
        record.residual = float(solution.residual.max())
        record.residual_mean = float(solution.residual.mean())
        record.converged = float(converged(solution.status).double().mean())
        record.message = message_of(solution.status)
    return records.open_record(record)


