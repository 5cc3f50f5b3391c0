"""`torch.allclose` as a tensor.

Dynamo cannot trace it, since it returns a Python bool. For our backend it becomes the comparison that its documentation
gives, |a - b| <= atol + rtol |b| for all elements, and the branch on it is one on a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dynamo, sites


def all_close(a: Tensor, b: Tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> Tensor:
    close = (a - b).abs() <= atol + rtol * b.abs()
    close = close | (a == b)  # infinities of one sign
    if equal_nan:
        close = close | (torch.isnan(a) & torch.isnan(b))
    return close.all()


def install() -> Callable[[], None]:
    """Patch Dynamo; returns what takes the patch out again."""
    call_function = dynamo.TorchInGraphFunctionVariable.call_function

    @functools.wraps(call_function)
    def patched(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value is torch.allclose and sites.ours(tx):
            return dynamo.UserFunctionVariable(all_close).call_function(tx, list(args), dict(kwargs))
        return call_function(self, tx, args, kwargs)

    def method_allclose(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not sites.ours(tx):
            return None  # Dynamo goes on as if there were no such method
        return dynamo.UserFunctionVariable(all_close).call_function(tx, [self, *args], kwargs)

    dynamo.TorchInGraphFunctionVariable.call_function = patched
    # a torch that has a method of its own for it keeps that
    restore = dynamo.trace_tensor_method("allclose", method_allclose) if dynamo.tensor_method("allclose") is None else None

    def remove() -> None:
        dynamo.TorchInGraphFunctionVariable.call_function = call_function
        if restore is not None:
            restore()

    return remove
