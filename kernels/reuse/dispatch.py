"""Which implementation works on the factors: Triton on a GPU, C++ on a CPU, ATen where they cannot."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..broyden.cpu import describe
from ..broyden.state import Factors
from ..device import on_gpu, triton_kernels
from ..tiles import offsets_fit
from . import aten, cpu, gpu
from .multisecant import Multisecant, apply_aten, multisecant_aten


def _fits(S: Tensor) -> bool:
    """Whether steps (B, M+1, D) are a matter for Triton."""
    return on_gpu(S.device) and offsets_fit(S.shape[1], S.stride(1))


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
    if _fits(factors.S) and (kernels := triton_kernels("reuse")) is not None:
        return gpu.apply_transpose(factors, x, kernels)
    functions = native.functions(factors.S, factors.C, x)
    if functions is None:
        return aten.apply_transpose(factors, x)
    y = torch.empty_like(x)
    functions.transpose(ctypes.addressof(describe(factors)), x.data_ptr(), y.data_ptr())
    return y


def multisecant(factors: Factors, skip: int = 0) -> Multisecant:
    """The type-II operator M, about (I - J^T)^-1, from the steps of a Broyden solve; formulas in :mod:`.multisecant`.

    Args:
        factors: of a Broyden solve; only S, C's diagonal and n are read.
        skip: the first pairs of every sample that are left out. After a restart the first two are not exact.
    """
    if _fits(factors.S) and (kernels := triton_kernels("reuse")) is not None:
        return gpu.multisecant(factors, skip, kernels)
    functions = native.functions(factors.S, factors.C)
    if functions is not None:
        return cpu.multisecant(factors, skip, functions)
    return multisecant_aten(factors, skip)


def apply_multisecant(operator: Multisecant, x: Tensor) -> Tensor:
    """M x, a new tensor: two reads of the steps. x: (B, D) in the compute dtype."""
    x = x.contiguous()
    if _fits(operator.S) and (kernels := triton_kernels("reuse")) is not None:
        return gpu.apply_multisecant(operator, x, kernels)
    functions = native.functions(operator.S, operator.V, x)
    return apply_aten(operator, x) if functions is None else cpu.apply(operator, x, functions)
