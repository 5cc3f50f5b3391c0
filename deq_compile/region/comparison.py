"""Compare a region with the user's own loop: may a solve stand in for it, or its own iterates to where they converge, or neither?

A body with several fixed points is told by a second start: where a solve from the fixed point of another sample ends apart, the
one that a solver finds is a matter of luck, and the loop's is that of its own trajectory. Measured on eight such bodies and on
trained ones with a single fixed point: `python -m bench multistable`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

import torch
from torch import Tensor

from . import why_kept
from .agree import agreed
from .backward import of_steps
from .forward import Solution
from .kept import OwnLoop
from .site import Site
from .solvers import PLAIN, SOLVERS, Solver
from .status import converged

# Two ends of solves that lie further apart, relative to their size, are two fixed points; where the body's precision is coarse,
# so many of its units.
APART, APART_EPS = 1e-2, 40.0

BLANK_BEFORE_KEPT = 3

# Plain iterations that the first call of a solver is compared with, in units of its own cap: they need more than a solver does.
PLAIN_CAP = 4

log = logging.getLogger("deq_compile.region")


class Solved(Protocol):
    """Another solve of the same call from `start` (B, D), by `tol` alone where `tested` is False."""

    def __call__(
        self, start: Tensor, tol: float, *, solver: Solver | None = None, max_iter: int | None = None, tested: bool = True
    ) -> Solution: ...


def compare(site: Site, solution: Solution, own: OwnLoop, z0: Tensor, rows: bool, solved: Solved) -> Solution | None:
    """Decide between solve, follow and kept. The solution to go on with; None where the loop's own result is to be given."""
    finite = torch.isfinite(own.z).all(1)
    if not own.z.numel():
        return solution
    if not bool(finite.any()):  # says nothing about the body; where that goes on, there is nothing to be gained by asking
        site.blank += 1
        if site.verdict == "pending" and site.blank >= BLANK_BEFORE_KEPT:
            site.decide("kept", None, why_kept.BLANK)
        return None
    site.blank = 0
    # A sample that the loop itself loses is its own; the others decide.
    several, raised = False, solution.raised
    good, distance, solution = _agrees(site, solution, own, finite, solved)
    if good and not site.follows:
        several = _ends_apart(site, solution, _second_start(solution.z, rows), finite, solved)
    elif not good and not site.follows:
        followed = solved(z0, site.tol, solver=PLAIN, max_iter=own.iterations)
        several, nearer, followed = _agrees(site, followed, own, finite, solved, solver=PLAIN)
        if several:
            good, distance, solution = True, nearer, followed
    mine, why = "follow" if several or site.follows else "solve", why_kept.ELSEWHERE
    if not good:
        reached = bool(converged(solution.status[finite]).all())
        mine, why = "kept", why_kept.apart(distance, site.allowed_distance, reached, raised)
    elif mine == "follow" and (site.spec.start_decides or of_steps(site.spec.config)):
        mine, why = "kept", why_kept.START if site.spec.start_decides else why_kept.STEPS
    site.misses = 0
    if site.verdict == "kept":
        site.adjoint_misses = 0
    site.verify_gradient = good and site.spec.grad
    site.checked = own.iterations
    site.decide(agreed(site, "value", mine), distance, why)
    return solution if good and site.verdict != "kept" and bool(finite.all()) else None


def compare_call(site: Site, solution: Solution, z0: Tensor, rows: bool, solved: Solved) -> Solution:
    """Look at a call of a solver for several fixed points. The user's solver cannot be run here; what it shares with most others
    is where plain iterations from z0 (B, D) lead, and there the region goes from then on, if it has several.
    """
    if not z0.numel():
        return solution
    everywhere = torch.ones_like(solution.status, dtype=torch.bool)
    config = site.spec.config
    tol, cap = config.tol if site.spec.stop else site.tol, config.max_iter * (PLAIN_CAP if site.calls == 0 else 1)
    plain = solved(z0, tol, solver=PLAIN, max_iter=cap, tested=False)
    other = _apart(site, solution, plain, everywhere, solved)
    several = other or _ends_apart(site, solution, _second_start(solution.z, rows), everywhere, solved)
    site.decide(agreed(site, "value", "follow" if several else "solve"), None)
    return plain if other else solution


def _agrees(
    site: Site, solution: Solution, own: OwnLoop, finite: Tensor, solved: Solved, solver: Solver | None = None
) -> tuple[bool, float, Solution]:
    """Whether a solution may stand for the loop's result, how far apart they are, and the solution, which may be a better one."""
    good = bool(converged(solution.status[finite]).all())
    distance = _distance(own.z[finite], solution.z[finite])
    allowed = site.allowed_distance
    solver = solver or (PLAIN if site.follows else None)
    if own.passed:  # the user's test calls this near enough, whatever the distance: it has to be the same fixed point
        site.loose = max(allowed, distance)
        tol = site.spec.config.tol
        if good and distance > allowed:
            end = solved(own.z, tol, tested=False)
            good = bool(converged(end.status[finite]).all()) and not _apart(site, solution, end, finite, solved)
        return good, distance, solution
    site.loose = allowed
    if good and distance > allowed and site.spec.config.provenance["tol"] != "option" and not site.spec.stop:
        # Who is off, the loop or the solve? On a slow body the default tolerance leaves more than verify_tol.
        tol = site.tol * max(0.1 * allowed / distance, 1e-2)
        better = solved(solution.z, tol, solver=solver)
        off, nearer = _distance(solution.z[finite], better.z[finite]), _distance(own.z[finite], better.z[finite])
        if bool(converged(better.status[finite]).all()) and nearer <= 0.5 * allowed < off:
            site.tol *= 0.25 * allowed / off
            log.info("region %s at %s: tolerance tightened to %.1e", site.key, site.spec.where, site.tol)
            distance = nearer
            solution = dataclasses.replace(solution, z=better.z, residual=better.residual, status=better.status)
    return good and distance <= allowed, distance, solution


def _second_start(z: Tensor, rows: bool) -> Tensor:
    """Each sample at the fixed point of another, z (B, D); where there is no other, at noise of its own mean and spread."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.device, z.dtype)
    spread = z.std(1, keepdim=True, unbiased=False)
    start = z.mean(1, keepdim=True) + noise * torch.where(spread > 0, spread, torch.ones_like(spread))
    if not rows or z.shape[0] < 2:
        return start
    other = z.roll(1, 0)
    alike = torch.linalg.vector_norm(other - z, dim=1) <= APART * torch.linalg.vector_norm(z, dim=1)
    return torch.where(alike[:, None], start, other)


def _ends_apart(site: Site, solution: Solution, start: Tensor, finite: Tensor, solved: Solved) -> bool:
    """Whether a solve from `start` converges to another fixed point. One that does not converge says nothing."""
    spec = site.spec
    if SOLVERS[spec.config.solver].plain:
        return False  # plain iterations from the user's own start end where the loop does
    other = solved(start, spec.config.tol if spec.stop else site.tol, tested=False)
    return _apart(site, solution, other, finite, solved)


def _apart(site: Site, a: Solution, b: Solution, finite: Tensor, solved: Solved) -> bool:
    """Whether two solutions are two fixed points. On a slow body two residuals at the tolerance may lie far from each other, and
    from the fixed point: so both are solved further before that is said."""
    limit = max(APART, APART_EPS * site.spec.body_eps)
    both = finite & converged(a.status) & converged(b.status)
    if not _far(a.z, b.z, both, limit):
        return False
    tol = 1e-2 * (site.spec.config.tol if site.spec.stop else site.tol)
    a, b = solved(a.z, tol, tested=False), solved(b.z, tol, tested=False)
    return _far(a.z, b.z, both & converged(a.status) & converged(b.status), limit)


def _far(a: Tensor, b: Tensor, which: Tensor, limit: float) -> bool:
    gap = torch.linalg.vector_norm(a - b, dim=1)
    size = torch.maximum(torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1))
    return bool((which & (gap > limit * size)).any())


def _distance(a: Tensor, b: Tensor) -> float:
    """Max over samples of |a - b| / |b|; a sample whose b is the origin is compared absolutely. Both (B, D)."""
    scale = torch.linalg.vector_norm(b, dim=1).clamp_min(torch.finfo(b.dtype).eps)
    return float((torch.linalg.vector_norm(a - b, dim=1) / scale).max())
