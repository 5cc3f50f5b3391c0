"""What is decided about a region at run time: does the solve stand in for the loop, and its gradient for the loop's."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import why_kept
from .adjoint import AdjointSolution, gradient_difference
from .agree import agreed
from .backward import BACKWARDS, Settled, of_steps
from .body import Linearised
from .forward import Solution
from .layout import Layout
from .probe import rows_are_independent
from .site import MISSES_BEFORE_KEPT, Site
from .status import AdjointStatus, Status, converged

# What may be left of the adjoint after N steps back, in units of what may be left of the distance to the fixed point: both
# shrink as the N-th power of the Jacobian, from another start.
GRADIENT_MARGIN = 10.0

# The relative error of the operands' gradients from which a default tolerance is tightened, and how far at most. Training does
# not tell less than that from the exact gradient.
GRADIENT_ERROR = 2e-2
LEAST_BACKWARD_TOL = 1e-4

# Captured solves whose outcome the host may not know yet.
MOST_PENDING = 16

log = logging.getLogger("deq_compile.region")


class RegionWarning(UserWarning):
    """A region did not do what was asked of it, and says so."""


def decide_rows(site: Site, state0: Sequence[Tensor], body: Callable[[Layout], Callable[[Tensor], Tensor]]) -> bool:
    """Whether dimension 0 is a batch of independent samples. Undecided, and harmless, below two samples.

    Args:
        site: takes note of it.
        state0: the state tensors of a call.
        body: f on the flat state of a layout, to be probed.

    Raises:
        ValueError: the option says so, and the shapes do not.
    """
    if site.rows and len(state0) == 1 and state0[0].dim():
        return True
    batched = all(s.dim() for s in state0) and len({s.shape[0] for s in state0}) == 1
    if site.rows and not batched:
        raise ValueError(
            f"fixed point at {site.spec.where}: expected state tensors with one batch size in dimension 0 for batch='rows', got "
            f"shapes {[tuple(s.shape) for s in state0]}. Fix: batch='whole' or batch='auto'"
        )
    if site.rows is None:
        if not batched:
            site.rows = False
        elif state0[0].shape[0] >= 2:
            layout = site.spec.layout([s.shape for s in state0], rows=True)
            site.rows = rows_are_independent(body(layout), layout.flatten(state0).detach(), site.spec.body_eps)
    return site.rows is not False


def count_misses(site: Site, solution: Solution) -> bool:
    """Whether a sample missed its tolerance. Says so once; a loop whose solve misses again and again goes back to its own
    iterations. What is not finite is no miss of the solver's: it neither counts nor makes good."""
    status = solution.status
    missed = status.numel() > 0 and not bool(converged(status).all())
    if not missed:
        site.misses = 0
        return False
    own = site.spec.own_loop_cap is not None and solution.outcome is None  # a captured solve has gone out already
    capped = bool((status == Status.MAX_ITER).any())
    site.misses += capped or bool(solution.raised)
    if not site.warned:
        site.warned = True
        share = float(converged(status).double().mean())
        goal = "the loop's own test" if site.spec.stop else f"tol={site.tol:g}"
        which = "last" if of_steps(site.spec.config) else "best"
        why = f"within max_iter={site.spec.config.max_iter}" if capped else "since the body's values are not finite"
        why = f"since the body raised {solution.raised}" if solution.raised else why
        warnings.warn(
            f"fixed-point region at {site.spec.where}: {1 - share:.0%} of the samples missed {goal} {why}; "
            + ("the loop's own iterations are run instead " if own else f"their {which} iterate is used ")
            + f"(largest residual {float(solution.residual.max()):.1e}). Raise max_iter or tol, or make the body contract",
            RegionWarning,
            stacklevel=2,
        )
    if site.compares and site.misses >= MISSES_BEFORE_KEPT:
        site.decide(agreed(site, "misses", "kept"), None, why_kept.misses(site.misses, "solves"))
    return True


def settle(site: Site) -> None:
    """Learn what captured solves came to, without waiting: those that may still be running are asked at a later call, so that the
    host runs ahead of the device. Once `MOST_PENDING` calls are unknown, the last of them is waited for."""
    pending = site.pending
    if not pending:
        return
    outcome = pending[-1].outcome
    assert outcome is not None
    if len(pending) < MOST_PENDING and not outcome.ready():
        return
    site.pending = []
    engines = {id(solution.outcome): solution.outcome for solution in pending}
    missed = [engine is not None and engine.missed_since() for engine in engines.values()]
    if not any(missed):
        site.misses = 0
        return
    for solution in pending:  # a miss is rare enough to ask the device about each
        count_misses(site, solution)


def loops_own_is_due(site: Site, settled: Settled) -> bool:
    """Whether a backward has to give the gradient of the user's own loop, whatever its adjoint would come to: the first one
    through its forward has seen that, or another forward's has before there was a first."""
    if not settled.done and site.verdict == "kept" and site.kept_reason == why_kept.GRADIENT:
        settled.done = settled.loops = True
    return settled.loops


def gradient_is_the_loops(site: Site, linear: Linearised, found: AdjointSolution, settled: Settled | None) -> bool:
    """Whether the implicit gradient may stand in for that of the user's own loop.

    A loop may agree with its fixed point in value and not in gradient: a state that is carried unchanged, projected or
    averaged (J has the eigenvalue 1) remembers where it started, and a fixed point that repels may be one that the loop
    never leaves. Two signs: the adjoint solve of a fixed-count loop misses its tolerance; or w is not forgotten in N steps
    back, since the loop's adjoint, the sum of the first N terms of the Neumann series, is w - (J^T)^N w. The second is looked
    at where the forward compared values. What is not forgotten would be the initial state's gradient: where that is all that
    some parameter gets, it is measured as strictly as the values are.

    Args:
        site, linear, found: region, body and adjoint.
        settled: of the forward, in the first backward through it; None in a later one, which does not look again.
    """
    config, check = site.spec.config, site.verify_gradient and settled is not None
    site.verify_gradient = site.verify_gradient and settled is None
    # The other backward modes ask for another gradient than the loop's.
    if not site.compares or BACKWARDS[config.backward].gradient != "implicit":
        return True
    if check and found.w.numel():
        w = found.w
        for _ in range(site.checked):
            w = linear.vjp(w)
        norms = torch.linalg.vector_norm(found.w, dim=1)
        left = (torch.linalg.vector_norm(w, dim=1) / norms).masked_fill(norms == 0, 0.0)
        if not bool((left <= (1.0 if site.spec.start_trained else GRADIENT_MARGIN) * site.loose).all()):
            site.decide(agreed(site, "gradient", "kept"), None, why_kept.GRADIENT)
            assert settled is not None
            settled.loops = True
            return False
    # backward_max_iter=0 asks for no refinement, so there nothing is missed
    missed = config.backward_max_iter > 0 and found.status not in (AdjointStatus.CONVERGED, AdjointStatus.FLOOR)
    site.adjoint_misses = site.adjoint_misses + 1 if missed else 0
    if site.adjoint_misses >= MISSES_BEFORE_KEPT:
        site.decide(agreed(site, "gradient's misses", "kept"), None, why_kept.misses(site.adjoint_misses, "adjoint solves"))
    return not missed


def measure_gradient(site: Site, found: AdjointSolution, attempt: Callable[[float], AdjointSolution]) -> AdjointSolution:
    """How far the operands' gradients are off: the difference to those at a tenth of the tolerance. A small adjoint residual does
    not say it, on a slow body least of all. Where it is too much at a tolerance that nobody asked for, that is tightened.

    Args:
        site: takes note of the error, and of the tolerance.
        found: the adjoint solution at the site's tolerance.
        attempt: an adjoint solution at another one.

    Returns:
        The solution at the tolerance to go on with.
    """
    tol, default = site.backward_tol, site.spec.config.provenance["backward_tol"] == "default"
    if found.status != AdjointStatus.CONVERGED:
        return found
    while True:
        better = attempt(0.1 * tol)
        site.gradient_error = gradient_difference(found.payload, better.payload)
        finite = math.isfinite(site.gradient_error)
        done = better.status != AdjointStatus.CONVERGED or not default or not finite or tol <= LEAST_BACKWARD_TOL
        if site.gradient_error <= GRADIENT_ERROR or done:
            break
        tol *= max(0.5 * GRADIENT_ERROR / site.gradient_error, 0.1)
        found = attempt(tol)
    if tol != site.backward_tol:
        site.backward_tol = tol
        log.info("region %s at %s: backward_tol tightened to %.1e", site.key, site.spec.where, tol)
    site.stand()
    return found


def warn_of_tangent(site: Site, converged: bool, residual: float) -> None:
    """Say, once, that a tangent of forward-mode AD missed the adjoint's tolerance; it goes out as it is."""
    if converged or site.warned_of_gradient:
        return
    site.warned_of_gradient = True
    warnings.warn(
        f"fixed point at {site.spec.where}: its tangent missed backward_tol={site.backward_tol:g}, with a residual of "
        f"{residual:.1e}; it is returned as it is. Raise backward_max_iter or backward_tol, or make f contract",
        RegionWarning,
        stacklevel=2,
    )


def warn_of_gradient(site: Site, found: AdjointSolution) -> None:
    """Say, once, that the implicit gradient missed its tolerance where no loop stands behind it, or none may (`verify="never"`):
    it goes out as it is. Elsewhere `gradient_is_the_loops` sees to it."""
    config = site.spec.config
    if site.compares or site.warned_of_gradient:
        return
    asked = BACKWARDS[config.backward].gradient == "implicit" and config.backward_max_iter > 0
    limit = max(10 * site.backward_tol, 0.1)
    if not asked or found.status in (AdjointStatus.CONVERGED, AdjointStatus.FLOOR) or found.residual <= limit:
        return
    site.warned_of_gradient = True
    warnings.warn(
        f"fixed-point region at {site.spec.where}: the implicit gradient missed backward_tol={site.backward_tol:g}, with an "
        f"adjoint residual of {found.residual:.1e} after {found.vjps} products; it is returned as it is. Raise "
        "backward_max_iter or backward_tol, or make the body contract",
        RegionWarning,
        stacklevel=2,
    )
