"""Keep DistributedDataParallel from cutting a loop in two.

Dynamo's DDPOptimizer splits a graph by gradient buckets before a backend sees it, and so a loop of 10 iterations arrives as
8 and 2. For our backend the graph is handed over whole; DDP's reducer works as before, it only overlaps less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deq_compile.torch_parts import backend_below


def innermost(backend: Any) -> Any:
    """The backend itself, below what torch has wrapped around it."""
    for _ in range(8):
        inner = backend_below(backend)
        inner = inner or getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)  # DDPOptimizer.compile_fn
        if inner is None or getattr(backend, "takes_whole_graphs", False):
            break
        backend = inner
    return backend


def takes_whole_graphs(backend: Any) -> bool:
    """Whether a backend, or what torch has wrapped around it, is ours."""
    return bool(getattr(innermost(backend), "takes_whole_graphs", False))


def install() -> Callable[[], None]:
    """Patch DDPOptimizer; returns what takes the patch out again. All other backends see it unchanged.

    Raises:
        ImportError, AttributeError: a torch whose DistributedDataParallel has no such thing.
    """
    from .dynamo import DDPOptimizer

    original = DDPOptimizer.compile_fn

    @functools.wraps(original)
    def compile_fn(self: Any, gm: Any, example_inputs: Any, **configs: Any) -> Any:
        if takes_whole_graphs(self.backend_compile_fn):
            return self.backend_compile_fn(gm, example_inputs, **configs)
        return original(self, gm, example_inputs, **configs)

    DDPOptimizer.compile_fn = compile_fn

    def remove() -> None:
        DDPOptimizer.compile_fn = original

    return remove
