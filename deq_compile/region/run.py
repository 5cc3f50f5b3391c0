"""A region at run time: forward (solve, verify, or the loop as it was) and backward (adjoint, or the loop's gradient)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.device import on_gpu

from . import engine, records
from .adjoint import AdjointSolution, jacobian_free, phantom, solve_adjoint
from .body import Linearised, Runner, runner_for
from .call import Call, solve_for
from .comparison import compare, compare_call
from .forward import Solution, or_plain
from .kept import loop_gradient, own_loop
from .layout import Layout
from .site import Site
from .status import converged, message_of
from .stop import any_of
from .stopwatch import Stopwatch, TimedLinearised
from .verdict import count_misses, gradient_is_the_loops, measure_gradient, warn_of_gradient
from .worth import factors_pay

OPEN_CAP = 1000  # plain iterations for a solve that missed, where the user's loop has no cap and the fixed point is meant


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
    """What one forward gives: fresh state tensors, the iterations of the loop where its own result is given and 0 elsewhere, over
    which rows, and what it leaves. `about` is (B, 2) float32: the stopping residual and the iterations of each sample, -1 for a
    loop. `held` is the flat state in one dimension, for the backward: who gets `states` may change them in place."""

    states: list[Tensor]
    kept: int
    rows: bool
    serial: int
    about: Tensor
    left: Left
    held: Tensor | None = None


def run_forward(site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]) -> Forward:
    """Solve a region, or run its loop."""
    spec, call = site.spec, Call(site, state0, operands, sizes)
    due = site.due() and not call.inside
    solution = first = call.first() if due or site.verdict != "kept" else None
    due = due or (first is not None and not call.inside and site.unusual(first.evaluations))
    everywhere = first is not None and call.layout.batch > 0 and not on_gpu(call.z0.device) and first.all_converged()
    linear = call.evaluations.linear() if everywhere else None
    own = None
    if due:
        assert first is not None
        own = call.own(linearised=False)
        site.compared(first.evaluations)
        solution = compare(site, first, own, call.z0, call.rows, call.solved)
    elif first is not None and not call.inside and first.outcome is None and site.call_due():
        solution = _where_it_missed(call, compare_call(site, first, call.z0, call.rows, call.solved))
    elif everywhere:
        site.misses = 0
    elif first is not None and not call.inside:
        solution = _where_it_missed(call, first)
    site.calls += call.layout.batch > 0
    if solution is None:
        own = own or call.own(linearised=True)
        z, kept, linears = own.z, own.iterations, own.linears
    else:
        z, kept, linears = solution.z, 0, ()
    factors = None
    if solution is not None and solution.state is not None and spec.stores_steps and (site.reuses or site.reuse_due()):
        factors = solution.state.alone()
    serial = 0 if call.inside else record_forward(site, solution, z, call.evaluations.count, factors, kept)
    if solution is None or first is None or solution.z is not first.z:
        linear = None
    about = z.new_full((call.layout.batch, 2), -1.0, dtype=torch.float32) if solution is None else solution.about()
    states, held = call.layout.outputs(z, fresh=spec.grad), z.reshape(-1) if spec.grad else None
    done = Forward(states, kept, call.rows, serial, about, Left(linear, linears, factors), held)
    if call.watch is not None:
        records.add_seconds(serial, call.watch.read())
    return done


def _where_it_missed(call: Call, solution: Solution) -> Solution | None:
    """The solution to go on with where not every sample is known to have converged; None where the user's own loop has to be
    run. A captured solve with a loop behind it is not waited for: what it came to is asked at the next call."""
    site, spec = call.site, call.site.spec
    cap = spec.own_loop_cap
    if solution.outcome is not None and (cap is not None or spec.iterations is not None):
        site.pending.append(solution.without_tensors())
        return solution
    if solution.missed() and cap is None:
        config = spec.config
        most = max(config.max_iter, spec.iterations or min(spec.own_cap or 1, OPEN_CAP))
        relative = config.stop_mode == "rel"
        solution = or_plain(solution, call.body, call.z0, cap=most, tol=site.tol, relative=relative, stop=call.stop)
    missed = count_misses(site, solution)
    return None if missed and cap is not None else solution


def run_backward(
    site: Site,
    cotangents: Sequence[Tensor | None],
    states: Sequence[Tensor],
    state0: Sequence[Tensor],
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    forward: tuple[int, bool, int],
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
    operands: Sequence[Tensor], sizes: Sequence[int], forward: tuple[int, bool, int], needs: tuple[bool, ...], left: Left,
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
        count = kept or spec.iterations or spec.config.max_iter
        return loop_gradient(layout, runner, layout.flatten(state0), q, operands, needs, serial, count, spec.config, linears)
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
        records.complete_adjoint(serial, q, found, site.gradient_error)
    if engine.capturing():  # nothing may be asked of the device
        return None, found.payload
    assert linear is not None
    warn_of_gradient(site, found)
    if gradient_is_the_loops(site, linear, found):
        return None, found.payload
    z0 = layout.flatten(state0).detach()
    stop = any_of(spec.own_tests, layout, (*operands, *sizes))
    count = spec.iterations or own_loop(spec, runner.evaluations(operands, None), z0, stop).iterations
    return loop_gradient(layout, runner, z0, q, operands, needs, serial, count, spec.config)


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
    raw = math.isinf(config.backward_tol)
    asks = state is not None and not inside and not raw and not on_gpu(z.device)
    due = asks and site.reuse_due()
    if asks and not (due or site.reuses):
        state = None
    measures = site.gradient_due() and not (raw or inside) and q.numel() > 0
    if on_gpu(z.device) and not (raw or inside or measures):
        settings = engine.AdjointSettings(site.backward_tol, max_iter, spec.body_eps, skip)
        engine.end_with(site)
        captured = engine.captured_adjoint((site.key, *sizes), runner, z, operands, needs, state, settings, config.engine)
        if captured is not None and (solved := captured.solve(z, q, operands, state)) is not None:
            return dataclasses.replace(solved[0], reused=state is not None), solved[1]
    linear = linear or runner.linearise(z, operands, needs)
    site.backwards += 1
    vjp, vjp_full, tol, eps = linear.vjp, linear.vjp_full, site.backward_tol, spec.body_eps
    estimate = records.recording() and not on_gpu(z.device)

    def attempt(factors: Factors | None, tol: float = tol, expected: int | None = site.expected_vjps) -> AdjointSolution:
        return solve_adjoint(
            vjp, vjp_full, q, factors, tol=tol, max_iter=max_iter, expected=expected, body_eps=eps, skip=skip,
            watched=not inside, estimate=estimate,
        )  # fmt: skip

    found = attempt(state)
    if due and state is not None and q.numel():
        site.reuse(factors_pay(vjp, q, state, found, tol=tol, max_iter=max_iter, body_eps=eps))
        if not site.reuses:  # this very call's gradient is that of the calls after it
            found, state = attempt(None), None
    if measures:
        found = measure_gradient(site, found, lambda tol: attempt(state, tol, None))
    return found, linear


def _factors_again(
    site: Site, layout: Layout, runner: Runner, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]
) -> Factors | None:
    """The factors of a forward whose own did not arrive: the same solve once more."""
    z0, stop = layout.matrix(state0).detach(), any_of(site.spec.stop, layout, (*operands, *sizes))
    state = solve_for(site, runner.evaluations(operands, None), z0, watched=not engine.capturing(), stop=stop).state
    return None if state is None else state.alone()


def record_forward(
    site: Site, solution: Solution | None, z: Tensor, evaluations: int, factors: Factors | None, iterations: int = 0
) -> int:
    if not records.recording():
        return 0
    record = records.SolveRecord(site.key, "kept" if solution is None else site.solving, evaluations=evaluations)
    record.z = z.detach().clone() if records.wants_tensors() else None
    if factors is not None:
        record.bytes = sum(t.numel() * t.element_size() for t in (factors.S, factors.C))
    if solution is None:
        record.iterations = record.iterations_max = iterations
    elif z.numel():
        record.iterations = float(solution.iterations.double().mean())
        record.iterations_max = int(solution.iterations.max())
        record.residual = float(solution.residual.max())
        record.residual_mean = float(solution.residual.mean())
        record.converged = float(converged(solution.status).double().mean())
        record.message = message_of(solution.status)
    return records.open_record(record)


