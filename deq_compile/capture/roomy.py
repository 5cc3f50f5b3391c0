"""Traces of ours run in a frame that leaves room for those above it: see :mod:`deq_compile.compiling`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deq_compile.compiling import in_room

from . import dynamo, sites


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patch out again."""
    return dynamo.patch_run(_run_handler)


def _run_handler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(self: Any) -> Any:
        return in_room(original, self) if self.parent is None and sites.ours(self) else original(self)

    return run
