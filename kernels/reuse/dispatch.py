"""Which implementation works on the factors: Triton on a GPU, C++ on a CPU, ATen where they cannot."""

from __future__ import annotations

import ctypes
import functools
from types import ModuleType

import torch
from torch import Tensor

from .. import native
from ..broyden.cpu import describe
from ..broyden.state import Factors
from . import aten, gpu


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The Triton kernels, None where Triton is not installed."""
    try:
        from . import triton_kernels as kernels
    except ImportError:
        return None
    return kernels


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
    x = x.contiguous()
    if x.device.type == "cuda" and (kernels := triton_kernels()) is not None:
        return gpu.apply_transpose(factors, x, kernels)
    functions = native.functions(factors.S, factors.C, x)
    if functions is None:
        return aten.apply_transpose(factors, x)
    y = torch.empty_like(x)
    struct = describe(factors, native.threads_for(x.numel()))
    functions.transpose(ctypes.addressof(struct), x.data_ptr(), y.data_ptr())
    return y


def adjoint_residual(q: Tensor, jw: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """r = q + J^T w - w and its norm for each sample: (B, D) and (B,), new tensors; all three arguments are (B, D)."""
    functions = native.functions(q, jw, w)
    if functions is None:
        r = (q + jw).sub_(w)
        return r, torch.linalg.vector_norm(r, dim=1)
    r, norms = torch.empty_like(q), q.new_empty(q.shape[0])
    functions.adjoint_residual(*q.shape, *(t.data_ptr() for t in (q, jw, w, r, norms)))
    return r, norms
