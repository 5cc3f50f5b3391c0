"""Triton's interpreter without two things that it does over and over, and that change nothing.

At every call of a device function it looks through all of triton.language for builtins to patch, though what it patched when the
kernel was launched is still in place. And it computes sums and products of integers a second time in 64 bits, to assert that
none overflows; without its debug option, which nothing here sets, the assertion is left out after that work.
Together they were more than a quarter of the CPU time of the interpreted tests.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """What of the language the patch for this function touches: it looks at the modules that its globals name."""
    found = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(module.__name__ for module in found if module in (tl, tl.core))


def quicken() -> None:
    """Patch once a launch; leave out the check of integers whose outcome is not looked at. For one process, for good."""
    patch, patched = interpreter._patch_lang, set[frozenset[str]]()

    def patch_once(function: Any) -> Any:
        key = _languages(function)
        if key in patched:  # in a launch: only the scope of the launch itself is ever restored
            return None
        is_launch = not patched
        scope = patch(function)
        patched.add(key)
        if is_launch:
            restore = scope.restore

            def restore_and_forget() -> None:
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
