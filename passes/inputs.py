"""What of a graph depends on the model's inputs, as opposed to its parameters, buffers and constants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from deq_compile.torch_parts import source_of

from .base import is_tensor, value_of


def reads_inputs(nodes: Iterable[fx.Node]) -> bool:
    """Whether an input tensor of the model goes into any of these nodes."""
    return any(_is_input(node) for node in _sources(nodes))


def trained_alone(nodes: Iterable[fx.Node], beside: Iterable[fx.Node]) -> bool:
    """Whether something that needs a gradient goes into `nodes` and not into those `beside` them."""
    others = _sources(beside)
    return any(value_of(node).requires_grad for node in _sources(nodes) - others)


def _sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The tensors of the outer world that go into these nodes."""
    stack, seen = list(nodes), set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return {node for node in seen if node.op == "placeholder" and is_tensor(node)}


def _is_input(node: fx.Node) -> bool:
    """Whether a placeholder stands for an argument of the call: no parameter, no attribute of an object, no global or closure.
    Where Dynamo does not say, it counts as one."""
    if isinstance(value_of(node), nn.Parameter):
        return False
    source: Any = source_of(node)
    while hasattr(source, "base"):
        if hasattr(source, "member"):  # an attribute
            return False
        source = source.base
    return bool(getattr(source, "is_input", type(source).__name__ != "GlobalSource"))
