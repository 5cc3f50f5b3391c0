"""Products with Broyden's factors in ATen operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..broyden.state import Factors
from ..precision import without_autocast


@without_autocast
def apply_transpose(factors: Factors, x: Tensor) -> Tensor:
    """-H^T x for x (B, D) in the compute dtype; see :func:`~.dispatch.apply_transpose`."""
    pairs = factors.slots_written - 1
    if pairs < 1:
        return x.clone()
    # No mask for samples with fewer pairs: their rows of C are zero, and every slot below `slots_written` is finite.
    S = factors.S[:, : pairs + 1].to(x.dtype)
    b = torch.bmm(x[:, None], S[:, 1:].transpose(1, 2))
    d = torch.bmm(b, factors.C[:, :pairs, :pairs])
    return torch.baddbmm(x[:, None], d, S[:, :pairs])[:, 0]
