"""Which tensors Triton kernels serve, and the kernels, where Triton is installed."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

_rehearsing = False


def on_gpu(device: torch.device) -> bool:
    """Whether tensors on this device are a matter for Triton."""
    return device.type == "cuda" or _rehearsing


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Treat the CPU as a GPU: tests and dry runs, in a process that has TRITON_INTERPRET=1."""
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


@functools.cache
def triton_kernels(operation: str) -> ModuleType | None:
    """The kernels of an operation ("broyden", "reuse" or "gcr"); None where Triton is not installed."""
    try:
        return importlib.import_module(f"deq_compile.kernels.{operation}.triton_kernels")
    except ImportError:
        return None
