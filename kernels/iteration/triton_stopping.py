"""The stopping rule for one sample, in Triton; reference.py is the one to read."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_shared import CONVERGED, FLOOR, MAX_ITER, NONFINITE, RUNNING, finite

# STALL_GAIN 0.9 and STALL_PATIENCE 5 of state.py stand below as numbers: the interpreter multiplies no constexpr.


@triton.jit
def classify(stop, best, mark, stall, count, tol, floor, threshold, max_iter, fallen, fallen_at_floor):
    """Status code, best, mark, stall, and whether this residual is the best so far.

    stop: the residual that the tolerance is for; threshold: the floor in its units; fallen, fallen_at_floor: 1 where |g| has
    fallen far enough for a small relative residual to count.
    """
    whole = finite(stop)
    # An integer: the interpreter spreads a comparison of floats over a block as floats, which take no `&`.
    improved = tl.where(whole & (stop < best), 1, 0)
    best = tl.where(improved != 0, stop, best)
    below = (best < threshold) & (floor > 0.0)
    gained = below & (best < mark * 0.9)
    mark = tl.where(gained, best, mark)
    stall = tl.where(gained | (below == 0), 0, stall + 1)
    code = tl.where(count >= max_iter, MAX_ITER, RUNNING)
    code = tl.where(below & (stall >= 5) & (fallen_at_floor != 0), FLOOR, code)
    code = tl.where((stop <= tol) & (fallen != 0), CONVERGED, code)
    code = tl.where(whole, code, NONFINITE)
    return code, best, mark, stall, improved
