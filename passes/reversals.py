"""Loops whose last states a backward of the user's own may go back from, step by step, as those of reversible networks do.

Such a backward needs the states in which the user's steps have ended. What is a fixed point but for the tolerance leads back to
another start, further off by every step: on a leaky layer in twelve steps of RevDEQ (arXiv 2509.12917), in float64, the gradient
of a weight was eighteen times the right one. A first-order state cannot be gone back from; two of one shape can.
"""

from __future__ import annotations

import torch
from torch import fx

from deq_compile.region.modes import Ambient
from deq_compile.torch_parts import HigherOrderOperator

from .ambient import GRAD_TARGETS, ambient_at
from .base import Loop, hint, value_of
from .copies import is_copy


def kept_for_backward(graph: fx.Graph, loop: Loop, start: Ambient, function: str) -> str | None:
    """Who may go back through the steps of a loop; None where nobody can.

    Args:
        graph: that the loop is in.
        loop: as it was found.
        start: modes at the beginning of the graph.
        function: the `torch.autograd.Function` whose forward runs the graph, or "".
    """
    chain = set(loop.nodes)
    live = [
        node
        for node, uses in zip(loop.outputs, loop.uses, strict=True)
        if any(user not in chain for use in uses for user in use.users)
    ]
    if loop.form == "fixed_point" or not _two_alike(live):
        return None  # whoever writes fixed_point has no steps of his own
    if function:
        return f"the forward of {function}"
    if start.grad and not ambient_at(graph, loop.first, start).grad and _two_alike(_handed_on(graph, loop, live)):
        return "they leave the graph, or are given to a Function in it, and no gradient was recorded"
    return None


def _handed_on(graph: fx.Graph, loop: Loop, live: list[fx.Node]) -> list[fx.Node]:
    """What no gradient was recorded of, made of states after the loop, and read by what stands behind the graph or by a Function.

    States that an attached step reads, where gradients are recorded, are those of an implicit gradient.
    """
    chain, made, grad = set(loop.nodes), {use for uses in loop.uses for use in uses}, False
    for node in graph.nodes:
        if node.target in GRAD_TARGETS:
            grad = bool(node.args[0])
        if node not in chain and (not grad or is_copy(node)) and made.intersection(node.all_input_nodes):
            made.add(node)
    readers = [node for node in graph.nodes if node.op == "output" or isinstance(node.target, HigherOrderOperator)]
    return [node for node in graph.nodes if node in made and any(node in reader.all_input_nodes for reader in readers)]


def _two_alike(nodes: list[fx.Node]) -> bool:
    values = [value_of(node) for node in nodes]
    shapes = [tuple(hint(size) for size in value.shape) for value in values if isinstance(value, torch.Tensor)]
    return len(set(shapes)) < len(shapes)
