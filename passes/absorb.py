"""Let a loop with a test begin where its iterations begin: the first ones may have been made without a test.

    for k in range(100):
        new = f(z, x)
        if k + 1 >= min_iter and (new - z).norm() < tol:      # not tested in the first iterations
            break

A solve has no least number of iterations: it begins from the initial state of them all.
"""

from __future__ import annotations

import torch
from torch import fx

from deq_compile.report import Reason

from .base import Loop, Pass, PassContext, value_of

MOST = 1000  # iterations that are taken in


class Absorb(Pass):
    name = "absorb"

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        taken = 0
        for loop in [loop for loop in context.loops if loop.tests]:
            count, lead = 0, set(loop.nodes)
            while count < MOST and (earlier := _before(loop, lead)) is not None:
                loop.stale += loop.initial
                loop.initial = earlier
                count += 1
            if count:
                # a loop of a fixed count that was made of those iterations is none any more
                stale = set(loop.stale)
                context.loops = [other for other in context.loops if other is loop or stale.isdisjoint(other.nodes)]
                cap = loop.hints.get("max_iter")
                loop.hints |= {"max_iter": cap + count} if isinstance(cap, int) else {}
                loop.lead -= count
                self._unsay(loop, context)
                loop.notes = (*loop.notes, f"its first {count} iterations, which are not tested, are part of it")
            taken += count
        return taken

    def _unsay(self, loop: Loop, context: PassContext) -> None:
        """What was said of those iterations alone holds no more."""
        told = context.report.skipped
        told[:] = [s for s in told if s.reason is not Reason.TOO_SHORT or s.location.file != loop.location.file or
                   s.location.function != loop.location.function]  # fmt: skip


def _before(loop: Loop, lead: set[fx.Node]) -> tuple[fx.Node, ...] | None:
    """The state of which one iteration makes the initial state of the loop; None where that was made otherwise, or is used. The
    nodes in `lead` are those of the loop and of the iterations that it has taken in; those of this one are added."""
    chain, segment = set(loop.nodes), set(loop.segment(-1))
    reads = {node: i for i, node in enumerate(loop.reads)}
    states: dict[int, fx.Node] = {}
    known: dict[tuple[fx.Node, fx.Node], bool] = {}

    def same(a: fx.Node, b: fx.Node) -> bool:
        """Whether `a` computes of the earlier state what `b`, in the last segment, computes of its own."""
        if b in reads:
            return states.setdefault(reads[b], a) is a
        if b not in segment or a is b:
            return a is b
        if (a, b) not in known:
            known[a, b] = a not in chain and a.op == b.op and a.target == b.target and _alike(a, b)
        return known[a, b]

    def _alike(a: fx.Node, b: fx.Node) -> bool:
        x, y = a.all_input_nodes, b.all_input_nodes
        return _spelled(a) == _spelled(b) and len(x) == len(y) and all(same(p, q) for p, q in zip(x, y, strict=True))

    if not all(same(a, b) for a, b in zip(loop.initial, loop.outputs, strict=True)) or len(states) != len(loop.initial):
        return None
    if any(user not in lead for node in loop.initial for user in node.users):
        return None  # somebody else looks at it
    found = tuple(states[i] for i in range(len(states)))
    if any(_meta(a) != _meta(b) for a, b in zip(found, loop.initial, strict=True)):
        return None
    lead.update(a for a, _ in known)
    return found


def _spelled(node: fx.Node) -> str:
    return str(fx.node.map_arg((node.args, node.kwargs), lambda a: "node"))


def _meta(node: fx.Node) -> str:
    value = value_of(node)
    return f"{value.shape} {value.dtype}" if isinstance(value, torch.Tensor) else ""
