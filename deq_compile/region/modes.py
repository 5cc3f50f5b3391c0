"""Modes a region was captured under, to be re-entered at run time: autograd's threads do not carry them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from deq_compile.torch_parts import RECORDING, DispatchKey, excluded_keys, force_dispatch_keys, included_keys

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Ambient:
    """Modes at one place: gradient recording, and (device type, enabled, dtype) of autocast for each device type."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def now() -> Ambient:
        """The modes of the calling thread."""
        cast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)
        return Ambient(torch.is_grad_enabled(), cast)

    @contextlib.contextmanager
    def autocast_entered(self) -> Iterator[None]:
        """Autocast as it was when the graph was captured: a thread of autograd's has it off."""
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                if enabled != torch.is_autocast_enabled(device) or (enabled and dtype != torch.get_autocast_dtype(device)):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


@contextlib.contextmanager
def autograd_recording() -> Iterator[None]:
    """Autograd records inside, also within an operator's kernel: there the dispatcher leaves autograd's keys out, and
    `torch.autograd.grad` would find no graph."""
    with _dispatching(*RECORDING), torch.enable_grad():
        yield


def functionalising() -> contextlib.AbstractContextManager[None]:
    """`torch.func.functionalize` works inside, also within an operator's kernel."""
    return _dispatching("Functionalize", "FuncTorchDynamicLayerBackMode", "FuncTorchDynamicLayerFrontMode")


@contextlib.contextmanager
def _dispatching(*keys: str) -> Iterator[None]:
    """The dispatcher heeds these keys again, which it leaves out below the kernel of an operator."""
    included, excluded = included_keys(), excluded_keys()
    for key in keys:
        excluded = excluded.remove(DispatchKey.__members__[key])
    with force_dispatch_keys(included, excluded):
        yield


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.no_grad()`, at no cost where gradients are off already: inside an operator they mostly are."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
