"""What the backward of a `torch.autograd.Function` does, read off its source; and whose forward is at work."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch


@functools.lru_cache(maxsize=256)
def differentiates_inside(cls: Any) -> bool:
    """Whether the backward of a function calls `grad` or `vjp` itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.backward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any((f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")) in ("grad", "vjp") for f in calls)


def forward_at_work(code: CodeType | None) -> str:
    """The name of the user's `torch.autograd.Function` whose forward has led to the calling code; "" for none. Torch's own, such
    as a checkpoint's, compute their gradients by the forward once more. `code` is of a frame that is about to run.

    By where forwards stand in their files: a frame that Dynamo has compiled runs other code, and no torch keeps the class on the
    stack.
    """
    known = {_place(forward): name for name, forward in _forwards(torch.autograd.Function)}
    if code is not None and (name := known.get(_place(code))):
        return name
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if name := known.get(_place(frame.f_code)):
            return name
        frame = frame.f_back
    return ""


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_filename, code.co_firstlineno


def _forwards(base: Any) -> Iterator[tuple[str, CodeType]]:
    """Name and code of the forward of each class of the user's below `base`."""
    for cls in base.__subclasses__():
        code = getattr(inspect.unwrap(cls.forward), "__code__", None)
        if code is not None and not cls.__module__.startswith("torch."):
            yield cls.__name__, code
        yield from _forwards(cls)
