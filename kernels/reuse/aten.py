"""Products with Broyden's factors in ATen operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..broyden.state import Factors


def apply_transpose(factors: Factors, x: Tensor) -> Tensor:
    """-H^T x, each sample with the steps it has stored; x itself where it has fewer than two (H = -I).

    -H^T x = x + sum_j d_j s_j with d = C^T b and b_j = s_{j+1} . x: two reads of S. SHINE (arXiv 2106.00553) and
    Nguyen & Mauch (arXiv 2304.11663) start the adjoint solve with it.

    Args:
        factors: of a Broyden solve.
        x: (B, D) in the compute dtype (that of C).

    Returns:
        (B, D), a new tensor in that dtype.
    """
    pairs = factors.high - 1
    if pairs < 1:
        return x.clone()
    # No mask for samples with fewer pairs: their rows of C are zero, and every slot below `high` is finite.
    S = factors.S[:, : pairs + 1].to(x.dtype)
    b = torch.bmm(x[:, None], S[:, 1:].transpose(1, 2))
    d = torch.bmm(b, factors.C[:, :pairs, :pairs])
    return torch.baddbmm(x[:, None], d, S[:, :pairs])[:, 0]
