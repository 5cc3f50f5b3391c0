"""The backward modes that are compared, each a function of (vjp, vjp_full, q, factors) -> AdjointSolution."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from deq_compile.testing import (
    BACKWARD_TOL_DEFAULT,
    BACKWARD_TOL_EXACT,
    VJP,
    AdjointSolution,
    Factors,
    VJPFull,
    jacobian_free,
    phantom,
    solve_adjoint,
)

# Far above what any mode needs to reach its tolerance on the bodies here; the default's own cap is part of the study.
CAP = 40

Mode = Callable[[VJP, VJPFull, Tensor, Factors | None], AdjointSolution]


def _jfb(vjp: VJP, vjp_full: VJPFull, q: Tensor, factors: Factors | None) -> AdjointSolution:
    return jacobian_free(vjp_full, q)


def _phantom(steps: int, damping: float) -> Mode:
    return lambda vjp, vjp_full, q, factors: phantom(vjp, vjp_full, q, steps, damping)


def _reuse(tol: float, cap: int = CAP, factors: bool = True) -> Mode:
    """Refinement to `tol`; the number of products of the last call is the prediction for the next, as in a region."""
    expected: dict[str, Any] = {}

    def run(vjp: VJP, vjp_full: VJPFull, q: Tensor, state: Factors | None) -> AdjointSolution:
        found = solve_adjoint(vjp, vjp_full, q, state if factors else None, tol=tol, max_iter=cap, expected=expected.get("n"))
        expected["n"] = found.needed
        return found

    return run


def _products(count: int, factors: bool = True) -> Mode:
    """Exactly `count` products: a tolerance that is never reached."""
    return _reuse(1e-30, count, factors)


# A name says what is done and what it costs: "reuse-3" is three products, "reuse<1e-2" as many as the tolerance takes.
MODES: dict[str, Callable[[], Mode]] = {
    "jfb": lambda: _jfb,
    "phantom-5": functools.partial(_phantom, 5, 0.5),
    "neumann-5": functools.partial(_phantom, 5, 1.0),
    "raw": functools.partial(_reuse, math.inf),
    "reuse-1": functools.partial(_products, 1),
    "reuse-2": functools.partial(_products, 2),
    "reuse-3": functools.partial(_products, 3),
    "reuse-5": functools.partial(_products, 5),
    "none-5": functools.partial(_products, 5, False),
    "reuse<3e-1": functools.partial(_reuse, 3e-1),
    "reuse<1e-1": functools.partial(_reuse, 1e-1),
    "none<1e-1": functools.partial(_reuse, 1e-1, CAP, False),
    "reuse<1e-2": functools.partial(_reuse, 1e-2),
    "none<1e-2": functools.partial(_reuse, 1e-2, CAP, False),
    "reuse<1e-3": functools.partial(_reuse, 1e-3),
    "exact": functools.partial(_reuse, BACKWARD_TOL_EXACT),
}
DEFAULT = f"reuse<{BACKWARD_TOL_DEFAULT:.0e}".replace("e-0", "e-")
