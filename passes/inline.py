"""Open the checkpointed calls of a loop, so that `z = checkpoint(f, z, x)` shows its body.

`torch.utils.checkpoint` arrives as a higher-order operator with one submodule a call. Where the same computation on the
same parameters is called often enough to be a loop, the calls are replaced by what they compute: a solve stores no
activations, and a kept loop recomputes them anyway. All other checkpoints (one a layer, say) stay as they are.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from deq_compile.markers import enter, leave

from .base import Pass, PassContext
from .extract import body_hash


def checkpoint_body(owner: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The graph of a checkpointed call; None for any other node."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    name = node.args[0]
    body = getattr(owner, str(name.target), None) if isinstance(name, fx.Node) else None
    return body if isinstance(body, fx.GraphModule) else None


class InlineCheckpoints(Pass):
    name = "inline"

    def __init__(self, owner: fx.GraphModule) -> None:
        self.owner = owner

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            body = self._body(node)
            if body is not None:
                outer = tuple(a.name for a in node.all_input_nodes[1:] if a.op in ("placeholder", "get_attr"))
                groups[body_hash(body, roles=False), outer].append(node)
        inlined = [node for calls in groups.values() if len(calls) >= context.min_repeats(calls) for node in calls]
        inlined += [node for node in _between_markers(graph) if node not in inlined and self._body(node) is not None]
        for node in inlined:
            self._inline(graph, node)
        return len(inlined)

    def _body(self, node: fx.Node) -> fx.GraphModule | None:
        """What a checkpoint computes, where that is a plain function of its arguments."""
        body = checkpoint_body(self.owner, node)
        plain = body is not None and all(n.op != "get_attr" for n in body.graph.nodes)
        taken_apart = all(user.target is operator.getitem for user in node.users)
        return body if plain and taken_apart and all(isinstance(a, fx.Node) for a in node.args) else None

    def _inline(self, graph: fx.Graph, node: fx.Node) -> None:
        body = self._body(node)
        assert body is not None
        arguments = iter(node.args[1:])
        env: dict[fx.Node, Any] = {}
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    env[inner] = next(arguments)
                elif inner.op == "output":
                    results = fx.node.map_arg(inner.args[0], env.__getitem__)
                else:
                    env[inner] = graph.node_copy(inner, env.__getitem__)
                    # Whose decorator's options hold, and where autocast stands, is said of the call.
                    for key in ("nn_module_stack", "custom"):
                        if key in node.meta:
                            env[inner].meta.setdefault(key, node.meta[key])
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        name = node.args[0]
        graph.erase_node(node)
        assert isinstance(name, fx.Node)
        if not name.users:
            graph.erase_node(name)


def _between_markers(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of regions that capture marked, and some beside them."""
    found, depth = [], 0
    for node in graph.nodes:
        depth += (node.target is enter) - (node.target is leave)
        if depth > 0:
            found.append(node)
    return found
