"""What functions hold on to between two calls: cells of their closures, iterators, generators, objects, sets and queues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import dynamo

MOST = 20_000  # objects that are looked at; where there are more, nothing is known


def states(tx: Any, roots: Iterable[tuple[str, Any]], mark: Callable[[Any], Any]) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    """(kind, object, name) -> (what tells its state from another, the object), of all that can be reached from variables.

    Args:
        roots: variables with the names that they go by.
        mark: what tells one value from another.
    """
    found: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    seen: set[int] = set()
    waiting = list(roots)
    while waiting and len(seen) < MOST:
        name, variable = waiting.pop()
        if variable is None or id(variable) in seen or dynamo.is_unseen(variable):
            continue
        seen.add(id(variable))
        variable = variable.realize() if hasattr(variable, "realize") else variable
        state = _state(tx, variable, mark)
        if state is not None:
            found["variable", id(variable), name] = state, variable
        waiting += _inside(tx, name, variable)
    if waiting and len(seen) >= MOST:
        found["variable", 0, "one of many"] = object(), None  # never as it was
    return found


def _state(tx: Any, variable: Any, mark: Callable[[Any], Any]) -> Any:
    if isinstance(variable, dynamo.CellVariable):
        inside = content(tx, variable)
        return None if inside is None else ("cell", mark(inside))
    kind = type(variable).__name__
    tracer = variable.__dict__.get("inline_tracer")
    if tracer is not None:
        return kind, tracer.instruction_pointer, tuple(mark(v) for v in tracer.symbolic_locals.values())
    if is_iterator(variable):
        numbers = {n: v for n, v in vars(variable).items() if type(v) is int}
        return kind, tuple(sorted(numbers.items())), tuple(mark(v) for v in _variables(vars(variable).values()))
    if kind.startswith("UserDefinedObject"):
        written = tx.output.side_effects.store_attr_mutations.get(variable, {})
        return kind, tuple((n, m) for n, v in written.items() if (m := mark(v)) != "data")
    items = variable.__dict__.get("items")
    if isinstance(items, list | dict) and variable.__dict__.get("mutation_type") is not None:
        keys = tuple(str(getattr(key, "vt", key)) for key in items) if isinstance(items, dict) else ()
        return kind, len(items), keys
    return None


def is_iterator(variable: Any) -> bool:
    """Whether each `next` of a variable takes something away."""
    return "inline_tracer" in variable.__dict__ or any(c.__name__ == "IteratorVariable" for c in type(variable).__mro__)


def _inside(tx: Any, name: str, variable: Any) -> Iterator[tuple[str, Any]]:
    """What a variable holds, by the name it goes by."""
    items = variable.__dict__.get("items")
    if isinstance(items, list | dict):
        for value in items if isinstance(items, list) else items.values():
            yield name, value
    for value in _variables(vars(variable).values()):
        yield name, value
    for value in tx.output.side_effects.store_attr_mutations.get(variable, {}).values():
        yield name, value
    if isinstance(variable, dynamo.CellVariable):
        yield name, content(tx, variable)
    closure = variable.__dict__.get("closure")
    cells = getattr(closure, "items", closure)
    if isinstance(cells, list | tuple) and hasattr(variable, "get_code"):  # looked at first, for the sake of the names
        yield from zip(variable.get_code().co_freevars, cells, strict=False)


def _variables(values: Iterable[Any]) -> list[Any]:
    known = dynamo.VariableTracker
    inner = [v for value in values if isinstance(value, list | tuple) for v in value]
    return [v for v in [*values, *inner] if isinstance(v, known)]


def content(tx: Any, cell: Any) -> Any:
    """What a cell holds; None where that is nothing yet."""
    try:
        return tx.output.side_effects.load_cell(cell)
    except Exception:  # it holds nothing yet
        return None
