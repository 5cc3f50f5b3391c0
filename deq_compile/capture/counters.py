"""The most iterations of a loop that counts for itself: `while gap > tol and k < cap`, or `if k >= cap: break` inside it.

Capture stays in a loop for a few iterations only. What the counter is compared with in each of them says when the comparison
would have come out the other way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import dynamo, marker
from .bytecode import Code, Exit

MOST = 1_000_000  # steps that are tried out


@dataclass(frozen=True)
class _Seen:
    """One comparison of two Python integers: the operands, how it came out, and the size of the graph then."""

    left: int
    right: int
    nodes: int


def handler(original: Callable[..., Any]) -> Callable[..., Any]:
    """A translator's handler of COMPARE_OP that takes note of comparisons of integers, frame by frame."""

    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        if len(self.stack) >= 2 and marker.ours(self):
            left, right = (_integer(v) for v in self.stack[-2:])
            if left is not None and right is not None:
                notes = self.__dict__.setdefault("_deq_compile_comparisons", {})
                notes.setdefault(id(inst), []).append(_Seen(left, right, _nodes(self)))
        return original(self, inst)

    return handle


def forget(tx: Any) -> None:
    """The loop is left: who comes again counts anew."""
    tx.__dict__.pop("_deq_compile_comparisons", None)


def cap(tx: Any, code: Code, exit: Exit, visits: list[int]) -> int:
    """The most iterations of the loop that `exit` leaves, 0 where nothing tells. `visits`: sizes of the graph when its test was
    met, in each iteration so far."""
    notes: dict[int, list[_Seen]] = tx.__dict__.get("_deq_compile_comparisons", {})
    found = []
    for i in sorted(exit.loop):
        inst = code.instructions[i]
        seen = notes.get(id(inst), [])
        jump = code.instructions[i + 1] if i + 1 < len(code.instructions) else None
        if not seen or jump is None or "POP_JUMP" not in jump.opname:
            continue
        leaves = code.exit_of(jump)
        if leaves is None or leaves.loop != exit.loop:
            continue
        guard = next((notes[id(g)] for g in _twins(code, inst, exit) if id(g) in notes), None)
        first, second, late = seen[0], seen[1] if len(seen) > 1 else None, False
        if guard:  # tested before the loop, and again after each iteration
            first, second = guard[-1], seen[0]
        else:
            # Whether an iteration's work lies before its comparison, or behind it.
            late = second is None or (len(visits) > 1 and second.nodes - visits[0] > visits[1] - second.nodes)
        most = _turns(inst.argval, first, second)
        if most is not None:
            found.append(most + late)
    return min(found, default=0)


def _turns(operator: Any, first: _Seen, second: _Seen | None) -> int | None:
    """How many steps from the first comparison to the one that comes out otherwise."""
    compare = _OPERATORS.get(str(operator).removeprefix("bool(").removesuffix(")"))
    steps = (1, 0) if second is None else (second.left - first.left, second.right - first.right)
    if compare is None or steps == (0, 0):
        return None
    before = compare(first.left, first.right)
    left, right = first.left, first.right
    for turn in range(1, MOST):
        left, right = left + steps[0], right + steps[1]
        if compare(left, right) != before:
            return turn
    return None


_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _twins(code: Code, inst: Any, exit: Exit) -> list[Any]:
    """The same comparison in the source, made before the loop."""
    return [
        other
        for i, other in enumerate(code.instructions)
        if i not in exit.loop and other.opname == inst.opname and other.positions == inst.positions
    ]


def _integer(variable: Any) -> int | None:
    if type(variable) is dynamo.LazyVariableTracker:
        return None  # looking would realise it
    value = variable.as_python_constant() if variable.is_python_constant() else None
    return value if type(value) is int else None


def _nodes(tx: Any) -> int:
    return len(tx.output.graph.nodes)
