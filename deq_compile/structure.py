"""A state of many tensors as a flat list and back: pytrees, and dataclasses that nobody registered as such."""

from __future__ import annotations

import dataclasses
from typing import Any

from .torch_parts import Absent, pytree

# A structure is a pytree of the leaves, with what stands behind each of them: None for a leaf, (class, names, structure of the
# values) for a dataclass.
Structure = tuple[Any, tuple[Any, ...]]


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree in order, and what it takes to put them together again."""
    parts, outer = _tree_flatten(tree)
    leaves: list[Any] = []
    inner: list[Any] = []
    for part in parts:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            names = tuple(f.name for f in dataclasses.fields(part) if f.init)
            values, structure = flatten(tuple(getattr(part, name) for name in names))
            leaves += values
            inner.append((type(part), names, structure, len(values)))
        else:
            leaves.append(part)
            inner.append(None)
    return leaves, (outer, tuple(inner))


def unflatten(leaves: list[Any], structure: Structure) -> Any:
    """The tree of :func:`flatten`, of other leaves."""
    outer, inner = structure
    parts: list[Any] = []
    at = 0
    for kind in inner:
        if kind is None:
            parts.append(leaves[at])
            at += 1
        else:
            cls, names, own, count = kind
            values = unflatten(leaves[at : at + count], own)
            parts.append(cls(**dict(zip(names, values, strict=True))))
            at += count
    return _tree_unflatten(parts, outer)


def _plain_flatten(tree: Any) -> tuple[list[Any], Any]:
    """Lists, tuples and dictionaries, and no container that somebody registered: where torch has no pytrees."""
    if type(tree) not in (list, tuple, dict):
        return [tree], None
    keys = list(tree) if isinstance(tree, dict) else None
    below = [_plain_flatten(value) for value in (tree.values() if isinstance(tree, dict) else tree)]
    shape = type(tree), keys, tuple((len(leaves), inner) for leaves, inner in below)
    return [leaf for leaves, _ in below for leaf in leaves], shape


def _plain_unflatten(leaves: list[Any], shape: Any) -> Any:
    if shape is None:
        return leaves[0]
    kind, keys, below = shape
    left = iter(leaves)
    values = [_plain_unflatten([next(left) for _ in range(count)], inner) for count, inner in below]
    return kind(values) if keys is None else dict(zip(keys, values, strict=True))


_tree_flatten, _tree_unflatten = (
    (_plain_flatten, _plain_unflatten) if isinstance(pytree, Absent) else (pytree.tree_flatten, pytree.tree_unflatten)
)
