"""What a loop says of itself, served from the solve that stands in for it.

    for k in range(100):
        new = f(z)
        residuals.append((new - z).norm().item())     # the list holds the last one
        self.depth += 1                               # the solve's count of evaluations
        ...

A number that moves by equal steps from visit to visit of a loop's test counts its iterations: after the loop it is what the
count of the solve makes of it. An attribute or a list that gets numbers read from tensors keeps those of the last iteration, and
its length is the count. All else that outlives an iteration is for the loop alone to say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from deq_compile import markers

from . import dynamo, effects
from .effects import Key, Snapshot

# At each visit of a loop's test, the Python numbers in sight.
History = list[dict[Key, int | float]]
LOCAL = "local"


def numbers(tx: Any, names: Iterable[str], world: Snapshot) -> dict[Key, int | float]:
    """The plain numbers in local variables of the frame at work, and in attributes."""
    places: dict[Key, Any] = {(LOCAL, 0, name): tx.symbolic_locals.get(name) for name in names}
    places |= {key: value for key, (_, value) in world.items() if key[0] in effects.ATTRIBUTES}
    found = {key: number(value) for key, value in places.items() if value is not None}
    return {key: value for key, value in found.items() if value is not None}


def number(value: Any) -> int | float | None:
    """The Python number that a variable is; None for all else."""
    if dynamo.is_unseen(value):
        return None
    value = value.realize() if hasattr(value, "realize") else value
    known = value.as_python_constant() if value.is_python_constant() else None
    return known if type(known) in (int, float) else None


def step(history: History, key: Key) -> float | None:
    """By how much a number moves from visit to visit; None where it does not move by equal steps."""
    values = [seen.get(key) for seen in history]
    known = [v for v in values if v is not None]
    if len(known) < len(values) or len({type(v) for v in known}) != 1:
        return None
    steps = [b - a for a, b in itertools.pairwise(known)]
    if not all(math.isclose(s, steps[0], rel_tol=1e-9, abs_tol=1e-12) for s in steps):
        return None
    return steps[0] if steps else 0


def is_told(tx: Any, key: Key, before: Snapshot, now: Snapshot, history: History) -> bool:
    """Whether a change that outlives an iteration is one that a solve can tell."""
    _, value = now[key]
    if key[0] in effects.ATTRIBUTES:
        return effects.is_data(tx, value) or (step(history, key) is not None and not read_before(tx, key))
    return _grown(tx, key, before, now) is not None


def read_before(tx: Any, key: Key) -> bool:
    """Whether an attribute was read before this call wrote it: it counts over many calls, and each of them would be compiled
    anew for the number that it finds."""
    ends = f"[{key[-1]!r}]", f".{key[-1]}"
    return any(guard.name.endswith(ends) for guard in tx.output.guards)


def _grown(tx: Any, key: Key, before: Snapshot, now: Snapshot) -> int | None:
    """How many numbers read from tensors a list has got; None where it changed in another way, or outlives this call."""
    variable = now[key][1]
    if key not in before or type(variable).__name__ != "ListVariable" or getattr(variable, "source", None) is not None:
        return None
    old, new = before[key][0], now[key][0]
    added, values = len(new) - len(old), variable.items
    return added if added > 0 and new[: len(old)] == old and all(_is_scalar(tx, v) for v in values[-added:]) else None


def _is_scalar(tx: Any, value: Any) -> bool:
    """A number read from a tensor, or a tensor of one number."""
    value = value.realize() if hasattr(value, "realize") else value
    if isinstance(value, dynamo.TensorVariable):
        example = value.as_proxy().node.meta.get("example_value")
        return isinstance(example, torch.Tensor) and all(s == 1 for s in example.shape) and not example.requires_grad
    return isinstance(value, dynamo.SymNodeVariable) and effects.depends_on_data(value)


def serve(tx: Any, place: tuple[str, int], live: Iterable[str], before: Snapshot, now: Snapshot, history: History) -> None:
    """Put what the solve tells in the place of what the last visit said. Called when the loop is left.

    place  the loop's site and entry
    live   local names that are read after the loop
    """
    for name in live:
        moved = step(history, (LOCAL, 0, name))
        if moved:
            first = history[0][LOCAL, 0, name]
            tx.symbolic_locals[name] = count(tx, place, first, moved, repr(name))
    for key in effects.changes(before, now):
        if key[0] in effects.ATTRIBUTES:
            moved = step(history, key)
            if moved:
                owner = effects.owner_of(tx, key)
                served = count(tx, place, history[0][key], moved, f"attribute {key[-1]!r}")
                tx.output.side_effects.store_attr(owner, key[-1], served)
        else:
            added = _grown(tx, key, before, now)
            if added is not None and len(now[key][1].items) > added:
                kept = now[key][1].items[-added:]
                name = f"the list at {key[-1]!r}"
                what = f"{name} holds the last iteration's numbers only; its length, asked for in the compiled code,"
                _shorten(now[key][1], kept, count(tx, place, added, added, what, kept))


def count(tx: Any, place: tuple[str, int], first: float, moved: float, what: str, kept: Sequence[Any] = ()) -> Any:
    given = [dynamo.build(tx, v) for v in (*place, f"{what} is the solve's count", first, moved)]
    with dynamo.numbers_of_tensors(tx):
        return dynamo.UserFunctionVariable(_traced_count).call_function(tx, [*given, *kept], {})


def _shorten(variable: Any, kept: Sequence[Any], length: Any) -> None:
    """Let a list hold its last entries only, and be as long as the count says."""
    variable.items[:] = kept

    def answer(*_: Any, **__: Any) -> Any:
        return length

    call_method: Callable[..., Any] = variable.call_method

    def asked(tx: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        return length if name == "__len__" else call_method(tx, name, *args, **kwargs)

    for name in ("sq_length", "sq_length_impl", "mp_length", "mp_length_impl"):  # by version of Dynamo
        if hasattr(variable, name):
            setattr(variable, name, answer)
    variable.call_method = asked


# ---- traced by Dynamo from here on


def _traced_count(site: Any, entry: Any, note: Any, first: Any, moved: Any, *kept: Any) -> Any:
    made = markers.told(site, entry, note, kept)[1]
    if isinstance(moved, int) and isinstance(first, int):
        return first + moved * (made.to(torch.int64).item() - 1)
    return first + moved * (made.double().item() - 1)
