"""What traced Python code changes besides its results: attributes of objects that outlive it, lists and dictionaries."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from deq_compile.torch_parts import free_unbacked_symbols

from . import dynamo, held

Key = tuple[Any, ...]
Snapshot = dict[Key, tuple[Any, Any]]  # where -> what tells its value from another, and Dynamo's variable
_LASTING = "attribute"
_NEW = "attribute of a new object"
_OF_ATTRIBUTE = "list or dict of attribute"
ATTRIBUTES = (_LASTING, _NEW)


def depends_on_data(value: Any) -> bool:
    if isinstance(value, dynamo.TensorVariable):
        return True
    return isinstance(value, dynamo.SymNodeVariable) and bool(free_unbacked_symbols(value.sym_num))


def is_data(tx: Any, value: Any) -> bool:
    """A tensor, a number read from one, or a tuple or list of those: what the graph computes."""
    value = value.realize() if hasattr(value, "realize") else value
    if isinstance(value, dynamo.CellVariable):
        value = tx.output.side_effects.load_cell(value)
    items = value.__dict__.get("items")
    if isinstance(items, list | dict):
        return all(is_data(tx, item) for item in (items if isinstance(items, list) else items.values()))
    return depends_on_data(value)


def held_in(tx: Any, value: Any) -> Any:
    """What a cell holds, None where that is nothing yet; any other variable itself."""
    return held.content(tx, value) if isinstance(value, dynamo.CellVariable) else value


def object_from_outside(value: Any) -> int | None:
    """What tells an object that the frame has not made from others; None for all that is none."""
    if value is None or (getattr(value, "source", None) is None and not dynamo.is_unseen(value)):
        return None
    known = dynamo.unseen(value) if dynamo.is_unseen(value) else value.__dict__.get("value")
    return None if known is None or isinstance(known, (*_PLAIN, torch.Tensor)) else id(known)


def snapshot(tx: Any, live: Collection[Any] = (), tensors: bool = True) -> Snapshot:
    """Everything mutable, as far as it can be told apart: attributes written, and what is in the containers in sight.

    live     names of the frame at work whose containers count; those of the frames that called it always do
    tensors  whether another tensor in the same place is a change
    """
    # what a cell of this very frame holds afterwards is a question of liveness
    return _snapshot(tx, live, tensors, [tx.symbolic_locals.get(name) for name in tx.f_code.co_cellvars])


def around(tx: Any, arguments: Iterable[Any]) -> Snapshot:
    """The same of all that functions among `arguments`, and the frames at work, get hold of: cells and iterators too."""
    cells = [owner for owner in tx.output.side_effects.store_attr_mutations if isinstance(owner, dynamo.CellVariable)]
    found = _snapshot(tx, tx.symbolic_locals, False, cells)
    roots = [item for frame in dynamo.frames(tx) for item in frame.symbolic_locals.items()]
    roots += [("an argument", value) for value in arguments]  # the last are looked at first
    found |= held.states(tx, roots, lambda value: _mark(tx, value, False))
    return found


def _snapshot(tx: Any, live: Collection[Any], tensors: bool, own: Collection[Any]) -> Snapshot:
    found: Snapshot = {}
    effects = tx.output.side_effects
    for owner, written in effects.store_attr_mutations.items():
        if any(owner is cell for cell in own):
            continue
        lasting = isinstance(owner.mutation_type, dynamo.AttributeMutationExisting)
        for name, value in written.items():
            found[_LASTING if lasting else _NEW, id(owner), name] = _mark(tx, value, tensors), value
            found |= _containers(tx, (_OF_ATTRIBUTE, id(owner), name), value, False)
    for key, value in effects.id_to_variable.items():
        found |= _containers(tx, ("list or dict", key, _spelled(value)), value, tensors)
    for frame in dynamo.frames(tx):
        for name, value in frame.symbolic_locals.items():
            if frame is not tx or name in live:
                found |= _containers(tx, ("list or dict", id(frame), name), value, False)
    return found


def _containers(tx: Any, key: Key, value: Any, tensors: bool, deep: bool = True) -> Snapshot:
    """A mutable container, and those in it."""
    content = _content(tx, value, tensors)
    if content is None:
        return {}
    found: Snapshot = {key: (content, value)}
    for name, inner in _named(value) if deep else ():
        found |= _containers(tx, (*key[:-1], f"{key[-1]}[{name}]"), inner, tensors, deep=False)
    return found


def _spelled(value: Any) -> str:
    """What the user calls an object from outside of the frame."""
    try:
        name = str(value.source.name)
    except (AttributeError, NotImplementedError):  # it has none, or one that cannot be spelled
        return type(value).__name__
    return re.sub(r"[LG]\['(\w+)'\]", r"\1", name)


def _named(container: Any) -> list[tuple[str, Any]]:
    """What is in a container, by its key or place."""
    items = container.__dict__["items"]
    if isinstance(items, list):
        return [(str(i), value) for i, value in enumerate(items)]
    return [(str(getattr(key, "vt", key)), value) for key, value in items.items()]


def changed(before: Snapshot, after: Snapshot) -> str | None:
    """What is not as it was, in words."""
    return next((words(key) for key in changes(before, after)), None)


def words(key: Key) -> str:
    return f"{key[0]} {key[-1]!r}"


def changes(before: Snapshot, after: Snapshot) -> Iterator[Key]:
    """What is not as it was. New objects and containers do not count, new attributes of old objects do."""
    for key, (now, _) in after.items():
        then = before.get(key, (None, None))[0]
        if then != now and (then is not None or (key[0] == _LASTING and now != "data")):
            yield key


def owner_of(tx: Any, key: Key) -> Any:
    """The object whose attribute a key names."""
    return next(owner for owner in tx.output.side_effects.store_attr_mutations if id(owner) == key[1])


def _content(tx: Any, value: Any, tensors: bool) -> tuple[Any, ...] | None:
    """What is in a mutable container. Tensors may change in one that is a state of a loop, as a variable may."""
    items = value.__dict__.get("items") if hasattr(value, "__dict__") else None
    if not isinstance(items, list | dict) or getattr(value, "mutation_type", None) is None:
        return None
    values = items.values() if isinstance(items, dict) else items
    return tuple(_mark(tx, v, tensors) for v in values)


_PLAIN = (type(None), int, float, str, bytes, tuple, list, dict, frozenset, torch.Size, torch.dtype)


def _constant(value: Any) -> Any:
    """What tells a Python constant, or a container of those, from others; None for all else."""
    if type(value) is dynamo.LazyVariableTracker:
        return None
    try:
        known = value.as_python_constant() if value.is_python_constant() else None
    except NotImplementedError:
        return None
    plain = value.is_python_constant() and isinstance(known, _PLAIN)
    return (type(known).__name__, repr(known)) if plain else None


def mark(tx: Any, value: Any) -> Any:
    """What tells a value from another, where one tensor is like any other."""
    value = value.realize() if hasattr(value, "realize") else value
    content = _content(tx, value, False)
    return content if content is not None else _mark(tx, value, False)


def _mark(tx: Any, value: Any, tensors: bool) -> Any:
    """What tells a value from another. Nothing that Dynamo has not looked at yet is looked at: that would change things."""
    constant = _constant(value)
    if constant is not None:
        return constant
    if tensors:
        return id(value)
    if dynamo.is_unseen(value):
        return "data" if isinstance(dynamo.unseen(value), torch.Tensor) else id(value)
    return "data" if is_data(tx, value) else id(value)
