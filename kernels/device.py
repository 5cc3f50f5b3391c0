"""The Triton kernels, where Triton is installed."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def triton_kernels(operation: str) -> ModuleType | None:
    """The kernels of an operation ("broyden" or "reuse"); None where Triton is not installed."""
    try:
        return importlib.import_module(f"deq_compile.kernels.{operation}.triton_kernels")
    except ImportError:
        return None
