"""Make the body of a loop a graph of its own: `body(*state, *operands, *sizes) -> state`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from deq_compile.torch_parts import qualified_name

from .ambient import AUTOCAST_TARGETS
from .base import Loop, Pass, PassContext, hint, value_of


class Extract(Pass):
    name = "extract"

    def __init__(self, owner: fx.GraphModule) -> None:
        self.owner = owner

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        for loop in context.loops:
            self._extract(loop)
        return len(context.loops)

    def _extract(self, loop: Loop) -> None:
        segment, first = loop.segment(-1), loop.segment(0)
        hoisted = set(loop.hoisted_offsets)
        rest = [node for offset, node in enumerate(segment) if offset not in hoisted]
        # outer node in the graph, and the node by which the last segment knows it
        known = {segment[o]: first[o] for o in loop.hoisted_offsets}
        inside, state, results = set(rest), loop.reads, loop.outputs
        reads = dict.fromkeys(a for node in rest for a in node.all_input_nodes if a not in inside)
        reads |= dict.fromkeys(node for node in results if node not in inside)  # a state that f makes of others' alone
        outer = {a: known.get(a, a) for a in reads if a not in state}
        tested = dict.fromkeys(a for test in loop.tests for a in test.reads)
        outer |= {a: a for a in tested}
        tensors = [a for a in outer if isinstance(value_of(a), torch.Tensor)]
        sizes = [a for a in outer if a not in tensors]

        body = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for prefix, group in (("z", state), ("a", tensors), ("s", sizes)):
            for i, node in enumerate(group):
                env[node] = body.placeholder(f"{prefix}{i}")
                env[node].meta["example_value"] = value_of(node)
        for node in rest:
            env[node] = body.node_copy(node, lambda a: env[a])
        body.output(tuple(env[node] for node in results))
        body.eliminate_dead_code(is_impure_node=_impure)
        for node in (*tensors, *sizes):  # read by dead code only
            if not env[node].users and node not in tested:
                body.erase_node(env[node])
        loop.body = fx.GraphModule(self.owner, body, class_name="Body")
        kept = [a for a in (*tensors, *sizes) if env[a].users or a in tested]
        loop.operands = tuple(outer[a] for a in kept if a in tensors)
        loop.sizes = tuple(outer[a] for a in kept if a in sizes)
        for test in loop.tests:
            test.positions = tuple(kept.index(a) for a in test.reads)


def _impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or node.target in AUTOCAST_TARGETS


def body_hash(body: fx.GraphModule, roles: bool = True) -> str:
    """A hash of what a body computes: operations, constants, dtypes, devices and layouts; not names, not sizes.

    roles: the names of placeholders count, which tell state from operands.
    """
    index = {node: i for i, node in enumerate(body.graph.nodes)}

    def spell(a: Any) -> str:
        return str(fx.node.map_arg(a, lambda n: f"%{index[n]}"))

    lines = []
    for node in body.graph.nodes:
        what = target_name(node.target) if node.op == "call_function" else str(node.target)
        made = value_of(node) if node.op == "placeholder" else None
        what = "" if node.op == "placeholder" and not roles else what
        if isinstance(made, torch.Tensor):
            what += f" {made.dtype} {made.device} {made.dim()} {dim_order(made)}"
        lines.append(f"{node.op} {what} {spell(node.args)} {spell(node.kwargs)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def target_name(target: str | Callable[..., Any]) -> str:
    name = qualified_name(target) if callable(target) else str(target)
    # two local functions may share a name and differ in what they do
    return f"{name}#{id(target)}" if "<locals>" in name or "<lambda>" in name else name


def dim_order(value: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest, as the strides have them; size-1 dimensions keep their place."""
    hints, sizes = [hint(s) for s in value.stride()], [hint(s) for s in value.shape]
    dense = sorted(range(value.dim()), key=lambda d: (-hints[d], d))
    expected = 1
    for d in reversed(dense):
        if sizes[d] != 1 and hints[d] != expected:
            return tuple(range(value.dim()))  # expanded or sliced: a fresh tensor is contiguous
        expected *= sizes[d]
    return tuple(dense)
