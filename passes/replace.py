"""Put one call in the place of a loop."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from .ambient import AUTOCAST_TARGETS
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
        outputs = loop.outputs
        target, args = self.make_call(loop)
        with graph.inserting_before(loop.segment(1)[0]):
            call = graph.call_function(target, args)
            call.meta = {k: v for k, v in loop.segment(0)[0].meta.items() if k != "example_value"}
            states = []
            for i, node in enumerate(outputs):
                item = graph.call_function(operator.getitem, (call, i))
                item.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
                item.meta["example_value"] = value_of(node)
                states.append(item)
        chain = set(loop.nodes)
        for node, item in zip(outputs, states, strict=True):
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in chain)
        keep = set(loop.kept_nodes)
        if keep:  # hoisted work may have to run under the autocast of its segment
            keep.update(node for node in loop.segment(0) if node.target in AUTOCAST_TARGETS)
        for node in reversed(loop.nodes):
            if node not in keep:
                graph.erase_node(node)
        return dict(zip(outputs, states, strict=True))
