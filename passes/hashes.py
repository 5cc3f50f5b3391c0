"""What nodes do, as hashes and keys: the same for nodes of equal segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from deq_compile.torch_parts import free_unbacked_symbols

from .base import value_of


def argument_nodes(node: fx.Node) -> list[fx.Node]:
    """All nodes a node reads, in order of appearance, with repetitions."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda a: found.append(a) or a)  # type: ignore[func-returns-value]
    return found


def signature(node: fx.Node, identity: bool) -> int:
    """Hash of what a node does. With `identity`, of which inputs and parameters it reads and what it makes as well."""

    def spell(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return ("input", a.name) if identity and a.op in ("placeholder", "get_attr") else "node"
        if isinstance(a, tuple | list):
            return tuple(spell(x) for x in a)
        if isinstance(a, dict):
            return tuple((k, spell(v)) for k, v in a.items())
        if isinstance(a, slice):
            return "slice", spell(a.start), spell(a.stop), spell(a.step)
        return type(a).__name__, str(a)

    made = meta_key(value_of(node)) if identity else None
    return hash((node.op, _spelled(node.target), spell(node.args), spell(node.kwargs), made))


def _spelled(target: Any) -> str:
    """A target as text. Torch 2.11 makes a function of its own for each call of a method of a DTensor: those go by their names,
    since loops on such tensors are refused, and have to be seen for that."""
    name = getattr(target, "__qualname__", "")
    return f"{target.__module__}.{name}" if "prim_types" in name else str(target)


def constants(node: fx.Node) -> str:
    """The arguments of a node that are no nodes, as text."""
    return str(fx.node.map_arg((node.args, node.kwargs), lambda a: None))


def meta_key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        stride = tuple(value.stride()) if value.layout is torch.strided else ()
        return str(tuple(value.shape)), str(stride), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(meta_key(v) for v in value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        # a number read from a tensor has a new symbol each time
        return type(value).__name__ if free_unbacked_symbols(value) else str(value)
    return type(value).__name__


def candidate_periods(hashes: Sequence[int]) -> list[int]:
    """Distances between equal windows of length 1, 2, 4, ...: a run of three periods p holds a window in (p/2, p]."""
    counts: Counter[int] = Counter()
    window, length, n = list(hashes), 1, len(hashes)
    while length <= n:
        seen: dict[int, int] = {}
        for i in range(n - length + 1):
            j = seen.get(window[i])
            if j is not None and length // 2 < i - j <= length:
                counts[i - j] += 1
            seen[window[i]] = i
        window = [hash((window[i], window[i + length])) for i in range(max(n - 2 * length + 1, 0))]
        length *= 2
    return list(counts)
