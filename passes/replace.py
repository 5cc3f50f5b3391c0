"""Put one call in the place of a loop."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from deq_compile.region.outputs import INFO

from .base import Loop, Pass, PassContext, value_of
from .exits import erase_unused

# From a loop to the arguments of the node that stands in for it: (target, arguments); the call returns a list of tensors
# of which the first are the state.
MakeCall = Callable[[Loop], tuple[Callable[..., object], tuple[Any, ...]]]


class Replace(Pass):
    name = "replace"

    def __init__(self, make_call: MakeCall) -> None:
        self.make_call = make_call

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        replaced: dict[fx.Node, fx.Node] = {}
        for loop in context.loops:
            # an earlier loop's result may be this one's operand or initial state
            loop.initial = tuple(replaced.get(node, node) for node in loop.initial)
            loop.operands = tuple(replaced.get(node, node) for node in loop.operands)
            replaced |= self._replace(graph, loop)
        graph.lint()
        return len(context.loops)

    def _replace(self, graph: fx.Graph, loop: Loop) -> dict[fx.Node, fx.Node]:
        """Put the call in; what now stands for each output of the loop."""
        uses = loop.uses
        target, args = self.make_call(loop)
        with graph.inserting_before(loop.anchor):
            call = graph.call_function(target, args)
            call.meta = {k: v for k, v in loop.first.meta.items() if k != "example_value"}
            made = [self._item(graph, call, i, value_of(node), node) for i, node in enumerate(loop.outputs)]
            about = [self._item(graph, call, len(made) + INFO, value_of(node), node) for node in loop.about]
            told = self._told(graph, call, len(made), loop)
        chain = set(loop.nodes)
        pairs = [(node, item) for nodes, item in zip(uses, made, strict=True) for node in nodes]
        pairs += zip(loop.about, about, strict=True)
        pairs += told
        for node, item in pairs:
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in chain)
        for node in reversed(loop.erased):
            graph.erase_node(node)
        for node in reversed(loop.stale):
            erase_unused(graph, node)
        for node, item in told:
            graph.erase_node(node)
            move_behind(graph, item)
        return dict(pairs)

    def _told(self, graph: fx.Graph, call: fx.Node, states: int, loop: Loop) -> list[tuple[fx.Node, fx.Node]]:
        """What stands for the numbers that a loop tells of itself."""
        pairs = []
        for node in loop.told:
            info = self._item(graph, call, states + INFO, None, node)
            largest = graph.call_function(torch.amax, (info, 0))
            if loop.lead:  # what the user's counter has counted, or has not, beside the solve
                shift = graph.call_function(torch.tensor, ([0.0, float(loop.lead), 0.0],))
                largest = graph.call_function(torch.add, (largest, graph.call_method("to", (shift, largest))))
            pairs.append((node, largest))
        return pairs

    def _item(self, graph: fx.Graph, call: fx.Node, index: int, value: Any, like: fx.Node) -> fx.Node:
        item = graph.call_function(operator.getitem, (call, index))
        item.meta = {k: v for k, v in like.meta.items() if k != "example_value"}
        item.meta["example_value"] = value
        return item


def move_behind(graph: fx.Graph, cursor: fx.Node) -> None:
    """Move what reads later nodes behind them: statistics of the solve, which stood before the attached step."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    limit, late = order[cursor], set()
    for node in graph.nodes:
        if order[node] <= limit and any(order[a] > order[node] or a in late for a in node.all_input_nodes):
            late.add(node)
    for node in [n for n in graph.nodes if n in late]:
        cursor.append(node)
        cursor = node
