"""f-strings of numbers read from tensors, `f"{err:.2e}"`: texts that are made behind the graph.

Torch 2.11 and 2.14 ask for the number while they trace, and end the graph there, or fail.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from typing import Any

from . import dynamo, effects, sites

_OPCODES = ("FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC")
_CONVERSIONS = ("", "!s", "!r", "!a")


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patches out again."""
    undo = []
    for cls in dynamo.translators():
        for opcode in (dis.opmap[name] for name in _OPCODES if name in dis.opmap):
            undo.append((cls, opcode, cls.dispatch_table[opcode]))
            cls.dispatch_table[opcode] = _handler(cls.dispatch_table[opcode])

    def remove() -> None:
        for cls, opcode, handler in undo:
            cls.dispatch_table[opcode] = handler

    return remove


def _handler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        if sites.ours(self):
            with sites.guarded(self, "making a text of a number"):
                if _formatted(self, inst):
                    return None
        return original(self, inst)

    return handle


def _formatted(tx: Any, inst: Any) -> bool:
    flags = (inst.arg or 0) if inst.opname == "FORMAT_VALUE" else 0
    has_how = inst.opname == "FORMAT_WITH_SPEC" or bool(flags & 4)
    how, value = tx.stack[-1] if has_how else None, tx.stack[-1 - has_how]
    if not isinstance(value, dynamo.SymNodeVariable) or not effects.depends_on_data(value):
        return False
    if how is not None and not how.is_python_constant():
        return False
    spec = f":{how.as_python_constant()}" if how is not None else ""
    tx.popn(1 + has_how)
    tx.push(dynamo.StringFormatVariable.create("{" + _CONVERSIONS[flags & 3] + spec + "}", [value], {}))
    return True
