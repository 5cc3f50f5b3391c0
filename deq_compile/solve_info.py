"""What a solve came to, as users get it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .kernels.iteration import CONVERGED, FLOOR

COLUMNS = 3  # of the tensor that a region gives beside its state: stopping residual, iterations, status


class SolveInfo(NamedTuple):
    """What a solve came to, for each sample of the batch: `fixed_point(return_info=True)` returns it beside the fixed point, and
    `register_solver(result=...)` gets it.

    residual    (B,) float32, the stopping residual at the returned iterate
    iterations  (B,) float32, evaluations of f until the sample stopped
    converged   (B,) bool, whether the tolerance was reached, or the floor of the precision below it
    """

    residual: Tensor
    iterations: Tensor
    converged: Tensor

    @staticmethod
    def of(solve_info: Tensor) -> SolveInfo:
        """From the (B, COLUMNS) tensor that a region gives beside its state."""
        status = solve_info[:, 2]
        return SolveInfo(solve_info[:, 0], solve_info[:, 1], (status == CONVERGED) | (status == FLOOR))
