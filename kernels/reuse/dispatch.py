"""Which implementation works on the factors: Triton on a GPU, C++ on a CPU, ATen where they cannot."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..broyden.cpu import describe
from ..broyden.state import Factors
from ..device import on_gpu, triton_kernels
from . import aten, gpu


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
    if on_gpu(x.device) and (kernels := triton_kernels("reuse")) is not None:
        return gpu.apply_transpose(factors, x, kernels)
    functions = native.functions(factors.S, factors.C, x)
    if functions is None:
        return aten.apply_transpose(factors, x)
    y = torch.empty_like(x)
    functions.transpose(ctypes.addressof(describe(factors)), x.data_ptr(), y.data_ptr())
    return y


def adjoint_residual(q: Tensor, jw: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """r = q + J^T w - w, |r_b| / scale_b, and |r| over the batch; a sample with scale 0 counts as solved.

    q, jw, w: (B, D); scale: (B,). Returns (B, D), (B,), and a number. Synchronises with the host.
    """
    jw = jw.to(q.dtype).contiguous()
    functions = native.functions(q, jw, w, scale)
    if functions is None:
        r = (q + jw).sub_(w)
        norms = torch.linalg.vector_norm(r, dim=1).masked_fill_(scale == 0, 0.0)
        return r, norms / scale.masked_fill(scale == 0, 1.0), float(torch.linalg.vector_norm(norms))
    r, relative = torch.empty_like(q), torch.empty_like(scale)
    batch = functions.adjoint_residual(*q.shape, *(t.data_ptr() for t in (q, jw, w, scale, r, relative)))
    return r, relative, batch
