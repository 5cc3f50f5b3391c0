"""The type-II operator in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..broyden.cpu import describe
from ..broyden.state import Factors
from .multisecant import RIDGE, RIDGE_FAR, Multisecant, empty_weights

_IDENTITY = native.Operator()


def multisecant(factors: Factors, skip: int, functions: native.Functions) -> Multisecant:
    """:func:`~.dispatch.multisecant`; rows of V from n on are not written."""
    V = empty_weights(factors)
    functions.multisecant(ctypes.addressof(describe(factors)), V.data_ptr(), V.shape[2], skip, RIDGE, RIDGE_FAR)
    return Multisecant(S=factors.S, V=V, n=factors.n, slots_written=factors.slots_written)


def native_operator(operator: Multisecant | None) -> native.Operator:
    """The C++ view of an operator, made once for each; None is the identity."""
    if operator is None:
        return _IDENTITY
    if operator.native is None:
        struct = native.Operator(slots=operator.V.shape[1], ld=operator.V.shape[2])
        struct.S, struct.V, struct.n = operator.S.data_ptr(), operator.V.data_ptr(), operator.n.data_ptr()
        operator.native = struct
    assert isinstance(operator.native, native.Operator)
    return operator.native


def apply(operator: Multisecant, x: Tensor, functions: native.Functions) -> Tensor:
    """M x for x (B, D), contiguous."""
    y = torch.empty_like(x)
    at = ctypes.addressof(native_operator(operator))
    functions.multisecant_apply(at, *x.shape, native.threads_for(x.numel()), x.data_ptr(), y.data_ptr())
    return y
