"""Which implementation takes a batch through a shared inverse: Triton on a GPU, ATen elsewhere and where the kernels cannot."""

from __future__ import annotations

from torch import Tensor

from ..device import on_gpu, triton_kernels
from .gpu import Products, serves
from .shared import Shared


def products(shared: Shared, like: Tensor) -> Products | None:
    """The Triton products for states like one (B, D), to be made once a solve; None where ATen serves (:class:`Shared`)."""
    if not on_gpu(like.device) or not serves(shared, like):
        return None
    kernels = triton_kernels("recycle")
    return None if kernels is None else Products.of(shared, like, kernels)
