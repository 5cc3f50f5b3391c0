"""Whether a solver's test is of the whole batch: found out by a trial, as everything about solvers is.

The problem has a large sample that is solved at once, and a small one that is not. Its residual is a sixth of the tolerance in
the Euclidean norm of the whole batch, ten times the tolerance in the largest element: a solver that returns the small sample
unsolved tests |f(z) - z| <= tol |f(z)| of all samples together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOL = 1e-3
ELEMENTS = 4096  # whose square root is well above 10
UNSOLVED = 0.12  # of the first residual; three iterations leave more, a tenth is what the largest element would ask for
_CONTRACTION = 0.6


def tests_whole_batch(solve: Callable[[Callable[[Tensor], Tensor], Tensor, float], Any], dims: int, dtype: torch.dtype) -> bool:
    """`solve(f, z0, tol)` gives the fixed point that a solver returns, or None, for states of `dims` dimensions."""
    if dims < 2:
        return False
    shape = (2, *((64, 64, 1, 1)[: dims - 1] if dims > 2 else (ELEMENTS,)))
    large, small = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    large[0] = 1.0
    small[1].view(-1)[0] = 10 * TOL
    moving = torch.zeros(shape, dtype=dtype)
    moving[1] = _CONTRACTION

    def f(z: Tensor) -> Tensor:
        return large + small + moving * torch.roll(z.flatten(1), 1, 1).view(shape)

    z = solve(f, torch.zeros(shape, dtype=dtype), TOL)
    if not isinstance(z, Tensor) or z.shape != shape:
        return False
    residual = (f(z) - z).flatten(1).norm(dim=1)
    return bool(residual[0] <= TOL and residual[1] > UNSOLVED * 10 * TOL)
