"""Tensors that are others with another history: detached, cloned, given to autograd anew."""

from __future__ import annotations

from torch import fx

from deq_compile.markers import adjoint_input

_SAME_VALUE = {"detach", "clone", "contiguous", "requires_grad_"}


def is_copy(node: fx.Node) -> bool:
    """Whether a node is its first argument with another history."""
    if node.target is adjoint_input:
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _SAME_VALUE and bool(node.args) and isinstance(node.args[0], fx.Node)


def source_of(node: fx.Node, stop: fx.Node | None = None) -> fx.Node:
    """What a node is a copy of; `stop` counts as an origin."""
    while node is not stop and is_copy(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def copies_of(node: fx.Node) -> list[fx.Node]:
    """All copies of a node, and theirs."""
    found = [user for user in node.users if is_copy(user)]
    return found + [further for copy in found for further in copies_of(copy)]
