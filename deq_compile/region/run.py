"""A region at run time: forward (solve, verify, or the loop as it was) and backward (adjoint, or the loop's gradient)."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors, coefficient_width, factors_of, row_width
from deq_compile.kernels.device import on_gpu

from . import engine, records
from .adjoint import AdjointSolution, jacobian_free, phantom, solve_adjoint
from .agree import agreed
from .body import Linearised, Runner, runner_for
from .forward import Solution, better_of, solve
from .layout import Layout
from .probe import rows_are_independent
from .site import MISSES_BEFORE_KEPT, Site
from .status import AdjointStatus, converged, message_of

# What may be left of the adjoint after N steps back, in units of what may be left of the distance to the fixed point: both
# shrink as the N-th power of the Jacobian, from another start.
GRADIENT_MARGIN = 10.0


log = logging.getLogger("deq_compile.region")


class RegionWarning(UserWarning):
    """A region did not do what was asked of it, and says so."""


@dataclasses.dataclass
class Forward:
    """What one forward leaves: fresh state tensors, steps per sample, and whether the loop was kept, over which rows.
    `about` is (B, 2) float32: the stopping residual and the iterations of each sample, -1 for a loop that was kept."""

    states: list[Tensor]
    n: Tensor
    kept: bool
    rows: bool
    serial: int
    about: Tensor


def run_forward(
    site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int], S: Tensor, C: Tensor
) -> Forward:
    """Solve a region, or run its loop. `S` and `C` are flat buffers for the factors, empty where none are kept."""
    spec, config = site.spec, site.spec.config
    inside = engine.under_capture(site, state0)
    if not inside:
        _settle(site)
    rows = _decide_rows(site, state0, operands, sizes)
    layout = spec.layout([s.shape for s in state0], rows)
    z0 = layout.flatten(state0).detach()
    runner = runner_for(spec.body, layout, operands, sizes)
    evaluations = 0

    def body(z: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return runner.apply(z, operands)

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

    due = site.due() and not inside
    solution = None
    if due or site.verdict == "solve":
        steps, coefficients = _buffers(S, C, layout, config.memory) if spec.stores_steps else (None, None)
        captured = None if inside else _captured(site, runner, z0, operands, sizes)
        if captured is not None:
            solution = captured.solve(z0, operands, steps, coefficients)
        if solution is None:
            solution = solved(z0, site.tol, steps, coefficients)
        if spec.iterations is None and not inside and solution.missed():
            own = spec.own_cap or config.max_iter
            solution = better_of(solution, lambda: solved(z0, site.tol, solver="picard", max_iter=own))
    loop = None
    if due and spec.iterations is not None and solution is not None:
        loop = _apply(body, z0, spec.iterations)
        solution = _verify(site, solution, loop, solved)
    elif inside:
        pass
    elif solution is not None and solution.outcome is None:
        count_misses(site, solution)
    elif solution is not None:  # what it came to is asked at the next call, when the device has long been done
        site.pending = dataclasses.replace(solution, z=solution.residual, state=None)
    site.calls += layout.batch > 0
    kept = site.verdict == "kept" and (loop is not None or solution is None)
    if kept:
        assert spec.iterations is not None
        z = loop if loop is not None else _apply(body, z0, spec.iterations)
        solution = None
    else:
        assert solution is not None
        z = solution.z
    serial = 0 if inside else record_forward(site, solution, z, evaluations, S, C)
    n = torch.zeros(layout.batch, dtype=torch.int32, device=z.device)
    if solution is not None and solution.state is not None:
        n = solution.state.n
    return Forward(layout.outputs(z), n, kept, rows, serial, _about(solution, n))


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
) -> tuple[list[Tensor] | None, list[Tensor | None]]:
    """Gradients of the initial state (None: zero) and of the operands marked in `needs`."""
    spec, (kept, rows, serial) = site.spec, forward
    layout = spec.layout([s.shape for s in states], rows)
    q = layout.flatten([torch.zeros_like(s) if c is None else c for s, c in zip(states, cotangents, strict=True)])
    runner = runner_for(spec.body, layout, operands, sizes)
    if kept or spec.config.backward == "unroll":
        return _loop_gradient(site, layout, runner, layout.flatten(state0), q, operands, needs, serial)
    z = layout.flatten(states)
    config = spec.config
    found: AdjointSolution
    if config.backward == "jfb":
        linear = runner.linearise(z, operands, needs)
        found = jacobian_free(linear.vjp_full, q)
    elif config.backward in ("phantom", "neumann"):
        linear = runner.linearise(z, operands, needs)
        damping = config.backward_damping if config.backward == "phantom" else 1.0
        found = phantom(linear.vjp, linear.vjp_full, q, config.backward_steps, damping)
    else:
        found, linear = _adjoint(site, layout, runner, z, q, operands, sizes, needs, factors)
        site.expected_vjps = found.needed
    if serial:
        records.complete(
            serial,
            cotangent=q,
            w=found.w,
            vjps=found.vjps,
            adjoint_residual=float(found.residuals.max()),
            adjoint_residual_mean=float(found.residuals.mean()),
            adjoint_residual_batch=float(found.residual),
            adjoint_message=found.status.message,
        )
    if engine.capturing():
        return None, found.payload
    z0 = layout.flatten(state0).detach()
    if spec.iterations is None:
        if declared_gradient_holds(site, found):
            return None, found.payload
        count = _own_iterations(site, layout, runner, z0, operands, sizes)
        return _loop_gradient(site, layout, runner, z0, q, operands, needs, serial, count)
    if _gradient_is_the_loops(site, linear, found):
        return None, found.payload
    return _loop_gradient(site, layout, runner, z0, q, operands, needs, serial)


def _adjoint(
    site: Site, layout: Layout, runner: Runner, z: Tensor, q: Tensor, operands: Sequence[Tensor], sizes: Sequence[int],
    needs: tuple[bool, ...], factors: tuple[Tensor, Tensor, Tensor],
) -> tuple[AdjointSolution, Linearised]:  # fmt: skip
    """The adjoint solve with the forward's factors, captured where that is possible; and the body linearised at z."""
    spec, config = site.spec, site.spec.config
    max_iter = max(1, config.backward_max_iter)
    skip = 2 if config.memory < config.max_iter else 0  # a restart may have left two pairs that are not exact
    state: Factors | None = None
    if spec.stores_steps:
        S, C, n = factors
        S, C = _buffers(S, C, layout, config.memory)
        n = n[: layout.batch]
        # On a GPU nothing is asked: the kernels look at each sample's own n.
        state = Factors(S=S, C=C, n=n, high=S.shape[1]) if on_gpu(z.device) else factors_of(S, C, n)
    inside = engine.capturing()
    if not math.isinf(config.backward_tol) and not inside:
        settings = engine.AdjointSettings(config.backward_tol, max_iter, spec.body_eps, skip)
        captured = engine.captured_adjoint((site.key, *sizes), runner, z, operands, needs, state, settings, config.engine)
        if captured is not None and (solved := captured.solve(z, q, operands, state)) is not None:
            return solved
    linear = runner.linearise(z, operands, needs)
    found = solve_adjoint(
        linear.vjp,
        linear.vjp_full,
        q,
        state,
        tol=config.backward_tol,
        max_iter=max_iter,
        expected=site.expected_vjps,
        body_eps=spec.body_eps,
        skip=skip,
        watched=not inside,
    )
    return found, linear


def _gradient_is_the_loops(site: Site, linear: Linearised, found: AdjointSolution) -> bool:
    """Whether the implicit gradient may stand in for that of a fixed-count loop.

    A loop may agree with its fixed point in value and not in gradient: a state that is carried unchanged, projected or
    averaged (J has the eigenvalue 1) remembers where it started, and a fixed point that repels may be one that the loop
    never leaves. Two signs: the adjoint solve misses its tolerance; or w is not forgotten in N steps back, since the
    loop's adjoint, the sum of the first N terms of the Neumann series, is w - (J^T)^N w. The second is looked at where
    the forward compared values.
    """
    config, check = site.spec.config, site.verify_gradient
    site.verify_gradient = False
    if not site.compares or config.backward != "reuse":  # the others ask for another gradient than the loop's
        return True
    if check and site.spec.iterations is not None and found.w.numel():
        w = found.w
        for _ in range(site.spec.iterations):
            w = linear.vjp(w)
        norms = torch.linalg.vector_norm(found.w, dim=1)
        left = (torch.linalg.vector_norm(w, dim=1) / norms).masked_fill(norms == 0, 0.0)
        good = bool((left <= GRADIENT_MARGIN * site.allowed_distance).all())
        if not agreed(f"{site.key}/adjoint", site.calls, good, site.spec.grad):
            site.decide("kept", None)
            return False
    # backward_max_iter=0 asks for no refinement, so there nothing is missed
    missed = config.backward_max_iter > 0 and found.status not in (AdjointStatus.CONVERGED, AdjointStatus.FLOOR)
    site.adjoint_misses = site.adjoint_misses + 1 if missed else 0
    if site.adjoint_misses >= MISSES_BEFORE_KEPT:
        site.decide("kept", None)
    return not missed


def declared_gradient_holds(site: Site, found: AdjointSolution) -> bool:
    """Whether the implicit gradient of a declared fixed point may be returned. A miss is said, once; and where nothing has
    been solved at all (a body that freezes samples has the Jacobian 1 there), a loop with a test has a gradient of its own."""
    config = site.spec.config
    limit = max(10 * config.backward_tol, 0.1)
    asked = config.backward == "reuse" and config.backward_max_iter > 0
    if not asked or found.status in (AdjointStatus.CONVERGED, AdjointStatus.FLOOR) or found.residual <= limit:
        return True
    back = site.spec.own_cap is not None
    if not site.warned_of_gradient:
        site.warned_of_gradient = True
        warnings.warn(
            f"fixed-point region at {site.spec.where}: the implicit gradient missed backward_tol={config.backward_tol:g}, with "
            f"an adjoint residual of {found.residual:.1e} after {found.vjps} products; "
            + ("the loop's own gradient is used. " if back else "it is returned as it is. ")
            + "Raise backward_max_iter or backward_tol, or make the body contract",
            RegionWarning,
            stacklevel=2,
        )
    return not back


def _own_iterations(
    site: Site, layout: Layout, runner: Runner, z0: Tensor, operands: Sequence[Tensor], sizes: Sequence[int]
) -> int:
    """Iterations after which the user's own loop ends."""
    spec, others = site.spec, (*operands, *sizes)

    def stop(z: Tensor, f: Tensor) -> bool:
        return any(test.holds(layout, z, f, others) for test in spec.stop)

    assert spec.own_cap is not None
    return solve(
        lambda z: runner.apply(z, operands),
        z0,
        solver="picard",
        tol=site.tol,
        stop_mode=spec.config.stop_mode,
        max_iter=spec.own_cap,
        body_eps=spec.body_eps,
        stop=stop if spec.stop else None,
    ).evaluations


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


def _settle(site: Site) -> None:
    """Learn what the last captured solve came to."""
    solution, site.pending = site.pending, None
    if solution is not None and solution.outcome is not None:
        missed, _ = solution.outcome()
        if missed:
            count_misses(site, solution)
        else:
            site.misses = 0


def _about(solution: Solution | None, n: Tensor) -> Tensor:
    if solution is None:
        return n.new_full((n.shape[0], 2), -1.0, dtype=torch.float32)
    return torch.stack([solution.residual.float(), solution.iterations.float()], dim=1)


def _decide_rows(site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    """Whether dimension 0 is a batch of independent samples. Undecided, and harmless, below two samples."""
    if site.rows is not None:
        if site.rows and (any(s.dim() == 0 for s in state0) or len({s.shape[0] for s in state0}) > 1):
            raise ValueError(
                f"region at {site.spec.where}: expected state tensors with one batch size in dimension 0 for batch='rows', "
                f"got shapes {[tuple(s.shape) for s in state0]}. Fix: batch='whole' or batch='auto'"
            )
        return site.rows
    if any(s.dim() == 0 for s in state0) or len({s.shape[0] for s in state0}) > 1:
        site.rows = False
        return False
    if state0[0].shape[0] < 2:
        return True
    layout = site.spec.layout([s.shape for s in state0], rows=True)
    runner = runner_for(site.spec.body, layout, operands, sizes)
    site.rows = rows_are_independent(lambda z: runner.apply(z, operands), layout.flatten(state0), site.spec.body_eps)
    return site.rows


def _buffers(S: Tensor, C: Tensor, layout: Layout, memory: int) -> tuple[Tensor, Tensor]:
    """The flat buffers in the shapes the kernels work on. One coupled system uses the first block of C."""
    batch, row = layout.batch, row_width(layout.width, S.device)
    steps = S[: batch * (memory + 1) * row].view(batch, memory + 1, row)[:, :, : layout.width]
    width = coefficient_width(memory)
    return steps, C[: batch * memory * width].view(batch, memory, width)


def _apply(body: Callable[[Tensor], Tensor], z: Tensor, times: int) -> Tensor:
    if not z.numel():
        return z.clone()  # an output may not share memory with an input
    for _ in range(times):
        z = body(z)
    return z


def _distance(a: Tensor, b: Tensor) -> float:
    """Max over samples of |a - b| / |b|; a sample whose b is the origin is compared absolutely. Both (B, D)."""
    scale = torch.linalg.vector_norm(b, dim=1).clamp_min(torch.finfo(b.dtype).eps)
    return float((torch.linalg.vector_norm(a - b, dim=1) / scale).max())


def _verify(site: Site, solution: Solution, loop: Tensor, solved: Callable[[Tensor, float], Solution]) -> Solution:
    """Compare the solve with the user's own loop: solve, or kept. Returns the solution to go on with."""
    if not solution.z.numel():
        return solution
    allowed, distance = site.allowed_distance, _distance(loop, solution.z)
    good = bool(converged(solution.status).all())
    if good and distance > allowed and site.spec.config.provenance["tol"] != "option":
        # Who is off, the loop or the solve? On a slow body the default tolerance leaves more than verify_tol.
        tol = site.tol * max(0.1 * allowed / distance, 1e-2)
        better = solved(solution.z, tol)
        own = _distance(solution.z, better.z)
        if bool(converged(better.status).all()) and _distance(loop, better.z) <= 0.5 * allowed < own:
            site.tol *= 0.25 * allowed / own
            log.info("region %s at %s: tolerance tightened to %.1e", site.key, site.spec.where, site.tol)
            distance = _distance(loop, better.z)
            solution = dataclasses.replace(solution, z=better.z, residual=better.residual, status=better.status)
    good = good and distance <= allowed
    site.misses = site.adjoint_misses = 0
    site.verify_gradient = good and site.spec.grad
    site.decide("solve" if agreed(site.key, site.calls, good, site.spec.grad) else "kept", distance)
    return solution


def count_misses(site: Site, solution: Solution) -> None:
    """A fixed-count loop whose solve misses its tolerance again and again goes back to its own iterations."""
    missed = solution.status.numel() > 0 and not bool(converged(solution.status).all())
    site.misses = site.misses + 1 if missed else 0
    if not missed:
        return
    if not site.warned:
        site.warned = True
        share = float(converged(solution.status).double().mean())
        goal = "the loop's own test" if site.spec.stop else f"tol={site.tol:g}"
        warnings.warn(
            f"fixed-point region at {site.spec.where}: {1 - share:.0%} of the samples missed {goal} "
            f"within max_iter={site.spec.config.max_iter}; their best iterate is used "
            f"(largest residual {float(solution.residual.max()):.1e}). Raise max_iter or tol, or make the body contract",
            RegionWarning,
            stacklevel=2,
        )
    if site.compares and site.misses >= MISSES_BEFORE_KEPT:
        site.decide("kept", None)


def record_forward(
    site: Site, solution: Solution | None, z: Tensor, evaluations: int, S: Tensor, C: Tensor
) -> int:
    if not records.recording():
        return 0
    record = records.SolveRecord(site.key, "kept" if solution is None else "solve", evaluations=evaluations)
    record.z = z.detach().clone() if records.wants_tensors() else None
    record.bytes = S.numel() * S.element_size() + C.numel() * C.element_size()
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


def _loop_gradient(
    site: Site,
    layout: Layout,
    runner: Runner,
    z0: Tensor,
    q: Tensor,
    operands: Sequence[Tensor],
    needs: tuple[bool, ...],
    serial: int,
    count: int | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The exact gradient of a loop: recompute its N iterates, then one VJP at each, last to first. Where a fixed point was
    declared there is no N, and the loop is that of `count` plain iterations, by default `max_iter`."""
    count = count or site.spec.iterations or site.spec.config.max_iter
    total: list[Tensor | None] = [None] * sum(needs)
    w = q
    for iterate in _iterates_backwards(runner, z0, operands, count, site.spec.config.loop_memory):
        w, grads = runner.linearise(iterate, operands, needs).vjp_full(w)
        total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
    if serial:
        records.complete(serial, cotangent=q, w=q, vjps=count, adjoint_message="the loop's own gradient")
    return layout.unflatten(w), total


def _iterates_backwards(
    runner: Runner, z0: Tensor, operands: Sequence[Tensor], count: int, memory: int | None
) -> Iterator[Tensor]:
    """z_{N-1}, ..., z_0. With `memory` m < N, at most about N/m + m of them are held: every m-th is stored, and the segment
    behind it is computed again when its turn comes."""
    stride = count if memory is None else min(memory, count)
    stored = [z0]
    while len(stored) * stride < count:
        z = stored[-1]
        for _ in range(stride):
            z = runner.apply(z, operands)
        stored.append(z)
    left = count - (len(stored) - 1) * stride
    while stored:
        segment = [stored.pop()]
        for _ in range(left - 1):
            segment.append(runner.apply(segment[-1], operands))
        while segment:
            yield segment.pop()
        left = stride
