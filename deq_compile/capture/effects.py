"""What traced Python code changes besides its results: attributes of objects that outlive it, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from deq_compile.torch_parts import free_unbacked_symbols

from . import dynamo

Snapshot = dict[tuple[Any, ...], Any]
_LASTING = "attribute"
_NEW = "attribute of a new object"


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


def snapshot(tx: Any, live: Collection[Any] = (), tensors: bool = True) -> Snapshot:
    """Everything mutable, as far as it can be told apart: attributes written, and what is in the containers in sight.

    live     names of the frame at work whose containers count; those of the frames that called it always do
    tensors  whether another tensor in the same place is a change
    """
    found: Snapshot = {}
    effects = tx.output.side_effects
    # what a cell of this very frame holds afterwards is a question of liveness
    own = [tx.symbolic_locals.get(name) for name in tx.f_code.co_cellvars]
    for owner, written in effects.store_attr_mutations.items():
        if any(owner is cell for cell in own):
            continue
        lasting = isinstance(owner.mutation_type, dynamo.AttributeMutationExisting)
        for name, value in written.items():
            found[_LASTING if lasting else _NEW, id(owner), name] = _mark(tx, value, tensors)
    for key, value in effects.id_to_variable.items():
        content = _content(tx, value, tensors)
        if content is not None:
            found["container", key, type(value).__name__] = content
    frame = tx
    while frame is not None:
        for name, value in frame.symbolic_locals.items():
            if (frame is not tx or name in live) and (content := _content(tx, value, False)) is not None:
                found["list or dict", id(frame), name] = (id(value), content)
        frame = frame.parent
    return found


def changed(before: Snapshot, after: Snapshot) -> str | None:
    """What is not as it was, in words. New objects and containers do not count, new attributes of old objects do."""
    for name, now in after.items():
        then = before.get(name)
        if then != now and (then is not None or (name[0] == _LASTING and now != "data")):
            return f"{name[0]} {name[-1]!r}"
    return None


def _content(tx: Any, value: Any, tensors: bool) -> tuple[Any, ...] | None:
    """What is in a mutable container. Tensors may change in one that is a state of a loop, as a variable may."""
    items = value.__dict__.get("items") if hasattr(value, "__dict__") else None
    if not isinstance(items, list | dict) or getattr(value, "mutation_type", None) is None:
        return None
    values = items.values() if isinstance(items, dict) else items
    return tuple(_mark(tx, v, tensors) for v in values)


def _mark(tx: Any, value: Any, tensors: bool) -> Any:
    """What tells a value from another. Nothing that Dynamo has not looked at yet is looked at: that would change things."""
    if tensors:
        return id(value)
    if isinstance(value, dynamo.LazyVariableTracker) and not value.is_realized():
        return "data" if isinstance(value._cache.value, torch.Tensor) else id(value)
    return "data" if is_data(tx, value) else id(value)
