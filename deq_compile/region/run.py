"""A region at run time: forward (solve, verify, or the loop as it was) and backward (adjoint, or the loop's gradient)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors, factors_of, shaped_buffers
from deq_compile.kernels.device import on_gpu

from . import engine, records
from .adjoint import AdjointSolution, jacobian_free, phantom, solve_adjoint
from .body import Linearised, Runner, runner_for
from .forward import Solution, better_of, solve
from .kept import iterate, loop_gradient, own_iterations
from .layout import Layout
from .site import Site
from .status import converged, message_of
from .stopwatch import Stopwatch, TimedLinearised
from .verdict import count_misses, decide_rows, declared_gradient_holds, gradient_is_the_loops, settle, verify
from .worth import factors_pay

log = logging.getLogger("deq_compile.region")


@dataclasses.dataclass
class Forward:
    """What one forward leaves: fresh state tensors, steps per sample, and whether the loop was kept, over which rows.
    `about` is (B, 2) float32: the stopping residual and the iterations of each sample, -1 for a loop that was kept. `linear` is
    the body linearised at the fixed point, where the last evaluation gave that too. `factors` are S and C, flat, of the batch as
    it was solved; None where there are none."""

    states: list[Tensor]
    n: Tensor
    kept: bool
    rows: bool
    serial: int
    about: Tensor
    factors: tuple[Tensor, Tensor] | None = None
    linear: Linearised | None = None


def run_forward(
    site: Site,
    state0: Sequence[Tensor],
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    buffers: Callable[[], tuple[Tensor, Tensor]],
) -> Forward:
    """Solve a region, or run its loop. `buffers` makes flat S and C for a solve on a GPU."""
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

    def stop(z: Tensor, f: Tensor) -> bool:
        others = (*operands, *sizes)
        return any(test.holds(layout, z, f, others) for test in spec.stop)

    def solved(
        start: Tensor,
        tol: float,
        steps: Tensor | None = None,
        coefficients: Tensor | None = None,
        solver: str = config.solver,
        max_iter: int = config.max_iter,
    ) -> Solution:
        return solve(
            body,
            start,
            solver=solver,
            tol=tol,
            stop_mode=config.stop_mode,
            max_iter=max_iter,
            memory=config.memory,
            factor_dtype=spec.factor_dtype,
            body_eps=spec.body_eps,
            S=steps,
            C=coefficients,
            watched=not inside,
            anderson_memory=config.anderson_memory,
            anderson_damping=config.anderson_damping,
            stop=stop if spec.stop else None,
        )

    if watch is not None:
        body, solved = watch.timed("body", body), watch.timed("solver", solved)
    due = site.due() and not inside
    solution, everywhere, factors = None, False, None
    if due or site.verdict == "solve":
        given: tuple[Tensor | None, Tensor | None] = (None, None)
        if spec.stores_steps and on_gpu(z0.device):
            factors = buffers()
            given = shaped_buffers(*factors, layout.batch, layout.width, config.memory)
        captured = None if inside else _captured(site, runner, z0, operands, sizes)
        if captured is not None:
            solution = captured.solve(z0, operands, *given)
        if solution is None:
            solution = solved(z0, site.tol, *given)
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
    if kept:
        assert spec.iterations is not None
        z = loop if loop is not None else iterate(body, z0, spec.iterations)
        solution = None
    else:
        assert solution is not None
        z = solution.z
    if solution is not None and solution.state is not None:
        n = solution.state.n
        if spec.stores_steps and factors is None:
            factors = solution.state.flat()
    else:
        n = torch.zeros(layout.batch, dtype=torch.int32, device=z.device)
    serial = 0 if inside else record_forward(site, solution, z, evaluations.count, *(factors or ()))
    if solution is None or first is None or solution.z is not first.z:
        linear = None
    about = n.new_full((n.shape[0], 2), -1.0, dtype=torch.float32) if solution is None else solution.about()
    done = Forward(layout.outputs(z), n, kept, rows, serial, about, factors, linear)
    if watch is not None:
        records.add_seconds(serial, watch.read())
    return done


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
    factors: tuple[Tensor, Tensor, Tensor],
    forward: tuple[bool, bool, int],
    needs: tuple[bool, ...],
    linear: Linearised | None = None,
) -> tuple[list[Tensor] | None, list[Tensor | None]]:
    """Gradients of the initial state (None: zero) and of the operands marked in `needs`; `linear` as in `Forward`."""
    serial = forward[2]
    watch = Stopwatch() if serial and records.wants_timing() else None
    try:
        return _gradients(site, cotangents, states, state0, operands, sizes, factors, forward, needs, linear, watch)
    finally:
        if watch is not None:
            records.add_seconds(serial, watch.read())


def _gradients(
    site: Site, cotangents: Sequence[Tensor | None], states: Sequence[Tensor], state0: Sequence[Tensor],
    operands: Sequence[Tensor], sizes: Sequence[int], factors: tuple[Tensor, Tensor, Tensor], forward: tuple[bool, bool, int],
    needs: tuple[bool, ...], linear: Linearised | None, watch: Stopwatch | None,
) -> tuple[list[Tensor] | None, list[Tensor | None]]:  # fmt: skip
    spec, (kept, rows, serial) = site.spec, forward
    layout = spec.layout([s.shape for s in states], rows)
    q = layout.matrix([torch.zeros_like(s) if c is None else c for s, c in zip(states, cotangents, strict=True)])
    if linear is not None and linear.source is not None:
        runner, operands = linear.source
    else:
        operands = spec.arranged(operands)
        runner = runner_for(spec.body, layout, operands, sizes)
    if kept or spec.config.backward == "unroll":
        return loop_gradient(site, layout, runner, layout.flatten(state0), q, operands, needs, serial)
    z = layout.matrix(states)
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
    needs: tuple[bool, ...], factors: tuple[Tensor, Tensor, Tensor], linear: Linearised | None,
) -> tuple[AdjointSolution, Linearised]:  # fmt: skip
    """The adjoint solve with the forward's factors, captured where that is possible; and the body linearised at z."""
    spec, config = site.spec, site.spec.config
    max_iter = max(1, config.backward_max_iter)
    skip = 2 if config.memory < config.max_iter else 0  # a restart may have left two pairs that are not exact
    inside = engine.capturing()
    # Asked on a CPU only: elsewhere the matrix products run ahead of the host, and the factors' cost is another.
    asks = spec.stores_steps and not inside and not math.isinf(config.backward_tol) and not on_gpu(z.device)
    due = asks and site.reuse_due()
    state: Factors | None = None
    if spec.stores_steps and (site.reuses or due or not asks):
        S, C, n = factors
        S, C = shaped_buffers(S, C, layout.batch, layout.width, config.memory)
        n = n[: layout.batch]
        # On a GPU nothing is asked: the kernels look at each sample's own n.
        state = Factors(S=S, C=C, n=n, high=S.shape[1]) if on_gpu(z.device) else factors_of(S, C, n)
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


def record_forward(
    site: Site, solution: Solution | None, z: Tensor, evaluations: int, *factors: Tensor
) -> int:
    if not records.recording():
        return 0
    record = records.SolveRecord(site.key, "kept" if solution is None else "solve", evaluations=evaluations)
    record.z = z.detach().clone() if records.wants_tensors() else None
    record.bytes = sum(t.numel() * t.element_size() for t in factors)
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


