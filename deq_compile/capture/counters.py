"""The most iterations of a loop that counts for itself: `while gap > tol and k < cap`, or `if k >= cap: break` inside it.

Capture stays in a loop for a few iterations only. What the counter is compared with in each of them says when the comparison
would have come out the other way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deq_compile import markers

from . import dynamo, sites
from .bytecode import Code, Exit

MOST = 100_000  # steps that are tried out


@dataclass(frozen=True)
class _Seen:
    """One comparison of two Python numbers: the operands, how it came out, and the size of the graph then."""

    left: float
    right: float
    nodes: int


def handler(original: Callable[..., Any]) -> Callable[..., Any]:
    """A translator's handler of COMPARE_OP that takes note of comparisons of numbers, frame by frame."""

    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        if len(self.stack) >= 2 and sites.ours(self):
            left, right = (_number(v) for v in self.stack[-2:])
            if left is not None and right is not None:
                notes = self.__dict__.setdefault("_deq_compile_comparisons", {})
                notes.setdefault(id(inst), []).append(_Seen(left, right, _nodes(self)))
        return original(self, inst)

    return handle


def passed_by(tx: Any, inst: Any) -> None:
    """Take note of a jump whose condition depends on data."""
    tx.__dict__.setdefault("_deq_compile_passed_by", set()).add(id(inst))


def forget(tx: Any) -> None:
    """The loop is left: who comes again counts anew."""
    tx.__dict__.pop("_deq_compile_comparisons", None)


def cap(tx: Any, code: Code, exit: Exit, visits: list[int], in_range: int | None) -> int:
    """The most iterations of the loop that `exit` leaves; 0 where its tests alone end it, HIDDEN where it has another exit that
    cannot be counted (yet).

    Args:
        visits: sizes of the graph when the test was met, in each iteration so far.
        in_range: of a `for`: the length of its range, 0 where it never ends, None where it is neither.
    """
    notes: dict[int, list[_Seen]] = tx.__dict__.get("_deq_compile_comparisons", {})
    data = tx.__dict__.get("_deq_compile_passed_by", set())
    found = [in_range] if in_range else []
    for i in sorted(exit.loop):
        inst = code.instructions[i]
        outside = [j for j in code.successors[i] if j not in exit.loop]
        if not outside or inst.opname == "SEND" or id(inst) in data or all(code.only_raises(j) for j in outside):
            continue
        if inst.opname == "FOR_ITER":
            if in_range is None:
                return markers.HIDDEN
            continue
        compared = next((code.instructions[k] for k in (i - 1, i - 2) if code.instructions[k].opname == "COMPARE_OP"), None)
        seen = notes.get(id(compared), [])
        most = _most(code, compared, exit, notes, seen, visits) if seen else None
        if most is None:
            return markers.HIDDEN
        found += [most] if most else []
    return min(found, default=0)


def _most(code: Code, inst: Any, exit: Exit, notes: dict[int, list[_Seen]], seen: list[_Seen], visits: list[int]) -> int | None:
    """Iterations until a comparison comes out otherwise; 0: never, None: not known."""
    guard = next((notes[id(g)] for g in _twins(code, inst, exit) if id(g) in notes), None)
    points = [guard[-1], *seen] if guard else seen  # tested before the loop, and again after each iteration
    steps = {(b.left - a.left, b.right - a.right) for a, b in itertools.pairwise(points)}
    if len(points) < 3 or len(steps) > 1:
        return None
    spelled = str(inst.argval).removeprefix("bool(").removesuffix(")")
    most = turns(spelled, (points[0].left, points[0].right), steps.pop())
    if most is None or guard:
        return most
    # Whether an iteration's work lies before its comparison, or behind it.
    late = len(visits) > 1 and seen[1].nodes - visits[0] > visits[1] - seen[1].nodes
    return most + late if most else 0


def turns(operator: str, first: Sequence[float], step: Sequence[float]) -> int | None:
    """How many steps from the first comparison to the one that comes out otherwise; 0 where none does, None: not known.

    Args:
        operator: as in Python's source.
        first: its two operands.
        step: by how much each of them moves.
    """
    compare = _OPERATORS.get(operator)
    if compare is None:
        return None
    left, right = first
    before = compare(left, right)
    for turn in range(1, MOST if any(step) else 1):
        left, right = left + step[0], right + step[1]
        if compare(left, right) != before:
            return turn
    return 0


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _twins(code: Code, inst: Any, exit: Exit) -> list[Any]:
    """The same comparison in the source, made before the loop. Those of a chain, `0 <= k < cap`, have one place: count them."""
    alike = [(i, o) for i, o in enumerate(code.instructions) if o.opname == inst.opname and o.positions == inst.positions]
    inside, before = ([o for i, o in alike if (i in exit.loop) is there] for there in (True, False))
    at = next(n for n, o in enumerate(inside) if o is inst)
    return before[at : at + 1] if len(before) == len(inside) else []


def _number(variable: Any) -> int | float | None:
    if type(variable) is dynamo.LazyVariableTracker:
        return None  # looking would realise it
    value = variable.as_python_constant() if variable.is_python_constant() else None
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) in (int, float) else None


def _nodes(tx: Any) -> int:
    return len(tx.output.graph.nodes)
