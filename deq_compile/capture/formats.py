"""f-strings of numbers read from tensors, `f"{err:.2e}"`: texts that are made behind the graph.

Torch 2.11 and 2.14 ask for the number while they trace, and end the graph there, or fail. Numbers that Python knows become
texts at once, of which decisions know what was written into them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import decisions, dynamo, effects, sites

_OPCODES = ("FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC")
_CONVERSIONS = ("", "!s", "!r", "!a")


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patches out again."""
    return dynamo.patch_instructions(dict.fromkeys(_OPCODES, _handler))


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
    plain = dynamo.is_plain(value) and type(value.as_python_constant()) in (int, float, str)
    read = isinstance(value, dynamo.SymNodeVariable) and effects.depends_on_data(value)
    if not (plain or read) or (how is not None and not how.is_python_constant()):
        return False
    spec = f":{how.as_python_constant()}" if how is not None else ""
    written = "{" + _CONVERSIONS[flags & 3] + spec + "}"
    tx.popn(1 + has_how)
    if plain:
        known = value.as_python_constant()
        text = written.format(known)
        if type(known) is not str or known in decisions.texts(tx):
            decisions.texts(tx)[text] = known if type(known) is not str else decisions.texts(tx)[known]
        tx.push(dynamo.build(tx, text))
    else:
        tx.push(dynamo.StringFormatVariable.create(written, [value], {}))
    return True
