"""What is decided about a region at run time: does the solve stand in for the loop, and its gradient for the loop's."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .adjoint import AdjointSolution
from .agree import agreed
from .body import Linearised, runner_for
from .forward import Solution
from .probe import rows_are_independent
from .site import MISSES_BEFORE_KEPT, Site
from .status import AdjointStatus, converged

# What may be left of the adjoint after N steps back, in units of what may be left of the distance to the fixed point: both
# shrink as the N-th power of the Jacobian, from another start.
GRADIENT_MARGIN = 10.0

log = logging.getLogger("deq_compile.region")


class RegionWarning(UserWarning):
    """A region did not do what was asked of it, and says so."""


def decide_rows(site: Site, state0: Sequence[Tensor], operands: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    """Whether dimension 0 is a batch of independent samples. Undecided, and harmless, below two samples."""
    if site.rows and len(state0) == 1 and state0[0].dim():
        return True
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


def verify(site: Site, solution: Solution, loop: Tensor, solved: Callable[[Tensor, float], Solution]) -> Solution:
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
    site.decide(agreed(site, "value", "solve" if good else "kept"), distance)
    return solution


def _distance(a: Tensor, b: Tensor) -> float:
    """Max over samples of |a - b| / |b|; a sample whose b is the origin is compared absolutely. Both (B, D)."""
    scale = torch.linalg.vector_norm(b, dim=1).clamp_min(torch.finfo(b.dtype).eps)
    return float((torch.linalg.vector_norm(a - b, dim=1) / scale).max())


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
        site.decide(agreed(site, "misses", "kept"), None)


def settle(site: Site) -> None:
    """Learn what the last captured solve came to."""
    solution, site.pending = site.pending, None
    if solution is not None and solution.outcome is not None:
        missed, _ = solution.outcome()
        if missed:
            count_misses(site, solution)
        else:
            site.misses = 0


def gradient_is_the_loops(site: Site, linear: Linearised, found: AdjointSolution) -> bool:
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
        if not bool((left <= GRADIENT_MARGIN * site.allowed_distance).all()):
            site.decide(agreed(site, "gradient", "kept"), None)
            return False
    # backward_max_iter=0 asks for no refinement, so there nothing is missed
    missed = config.backward_max_iter > 0 and found.status not in (AdjointStatus.CONVERGED, AdjointStatus.FLOOR)
    site.adjoint_misses = site.adjoint_misses + 1 if missed else 0
    if site.adjoint_misses >= MISSES_BEFORE_KEPT:
        site.decide(agreed(site, "gradient's misses", "kept"), None)
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
