"""Put one call in the place of a loop."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from deq_compile.region.outputs import INFO

from .base import Loop, Pass, PassContext, value_of

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
        chain = set(loop.nodes)
        pairs = [(node, item) for nodes, item in zip(uses, made, strict=True) for node in nodes]
        pairs += zip(loop.about, about, strict=True)
        for node, item in pairs:
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in chain)
        for node in reversed(loop.erased):
            graph.erase_node(node)
        return dict(pairs)

    def _item(self, graph: fx.Graph, call: fx.Node, index: int, value: Any, like: fx.Node) -> fx.Node:
        item = graph.call_function(operator.getitem, (call, index))
        item.meta = {k: v for k, v in like.meta.items() if k != "example_value"}
        item.meta["example_value"] = value
        return item
