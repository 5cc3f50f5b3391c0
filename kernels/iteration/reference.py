"""The stopping rule in plain Python, for one sample and a whole sequence of residuals: what every implementation has to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .state import (
    COARSE,
    CONVERGED,
    FALL,
    FALL_AT_COARSE_FLOOR,
    FLOOR,
    MAX_ITER,
    NONFINITE,
    NORM_EPS,
    RESOLUTION,
    RUNNING,
    STALL_GAIN,
    STALL_PATIENCE,
)


@dataclass(frozen=True)
class Stopped:
    """How a sequence ends: code, evaluations (0 while it runs), the best residual, and the evaluation it belongs to (0: none)."""

    code: int
    evaluations: int
    best: float
    at: int


def classify_sequence(
    residuals: Sequence[tuple[float, float]], *, tol: float, floor: float, eps: float, relative: bool = True,
    cap: int | None = None, falls: bool = True,
) -> Stopped:  # fmt: skip
    """Go through the residuals of one sample until it stops.

    Args:
        residuals: (|g|, |f|) at each evaluation; not finite where the body is not.
        tol: residual at which the sample stops.
        floor: relative residual below which stagnation counts as having converged; 0: it never does.
        eps: unit round-off of the compute dtype.
        relative: whether the residual is |g| / (|f| + 1e-9) or |g|.
        cap: evaluations; None: no cap.
        falls: whether |g| has to fall too before a relative residual counts; the adjoint's, relative to q, says it itself.
    """
    best, at, mark, stall, ceiling = math.inf, 0, math.inf, 0, math.inf
    at_floor = FALL_AT_COARSE_FLOOR if floor > COARSE else FALL
    for k, (g, f) in enumerate(residuals, 1):
        scale = f + NORM_EPS
        stop = g / scale if relative else g
        if k == 1:
            least = (2 * tol / FALL) * scale if relative else tol / FALL
            ceiling = max(g, 2 * floor / at_floor * scale, least) if falls else math.inf
        if not math.isfinite(stop):
            return Stopped(NONFINITE, k, best, at)
        known = max(g, RESOLUTION * eps * scale)
        if stop < best:
            best, at = stop, k
        below = floor > 0 and best < (floor if relative else floor * scale)
        if below and best < STALL_GAIN * mark:
            mark, stall = best, 0
        else:
            stall = stall + 1 if below else 0
        if stop <= tol and known <= FALL * ceiling:
            return Stopped(CONVERGED, k, best, at)
        if below and stall >= STALL_PATIENCE and known <= at_floor * ceiling:
            return Stopped(FLOOR, k, best, at)
        if k == cap:
            return Stopped(MAX_ITER, k, best, at)
    return Stopped(RUNNING, 0, best, at)
