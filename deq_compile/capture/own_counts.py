"""Integers of modules that count loops: `for _ in range(self.steps)`, with `self.steps` set to something else between calls.

Dynamo takes an integer attribute of a module for a constant, and traces the model anew for each value. One that counts a loop is
taken as an argument of a function is: as a symbol, from its second value on.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from . import dynamo, sites

# What counts a loop: (code that is compiled, how the integer is reached from it), for each backend.
_counts: weakref.WeakKeyDictionary[Any, set[tuple[Any, str]]] = weakref.WeakKeyDictionary()


def note(tx: Any, args: Sequence[Any]) -> None:
    """Take note of where the integers come from that say how often a loop runs."""
    for variable in args:
        source = dynamo.source_of(variable)
        if source is not None and dynamo.is_of_module(source):
            _counts.setdefault(sites.backend_of(tx), set()).add(_place(tx, source))


def builder(original: Callable[..., Any]) -> Callable[..., Any]:
    """What makes variables of values from outside, for which such an integer is like any other."""

    @functools.wraps(original)
    def wrap(self: Any, value: Any) -> Any:
        if type(value) is int and self.source is not None and sites.ours(self.tx):
            with sites.guarded(self.tx, "looking at an integer of a module"):
                counts = _place(self.tx, self.source) in _counts.get(sites.backend_of(self.tx), ())
            if counts:
                with dynamo.integers_of_modules():
                    return original(self, value)
        return original(self, value)

    return wrap


def _place(tx: Any, source: Any) -> tuple[Any, str]:
    return dynamo.outermost(tx).f_code, dynamo.name_of(source)
