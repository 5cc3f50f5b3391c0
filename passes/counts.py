"""Take integer counters out of the state of a loop of fixed count: what they come to is known.

state = {"z": f(state["z"]), "k": state["k"] + 1}
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from deq_compile.markers import is_passage

from .base import Loop, Pass, PassContext, value_of


class Counts(Pass):
    name = "counts"

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        taken = 0
        for loop in context.loops:
            if any(is_passage(node.target) for node in loop.segment(-1)):
                continue  # how often such a loop runs is for its solve, or its input, to say
            for index in reversed(range(len(loop.carried))):
                step = _step(loop, index)
                if step is not None and len(loop.carried) > 1:
                    _take_out(graph, loop, index, step)
                    taken += 1
        return taken


def _step(loop: Loop, index: int) -> int | None:
    """By how much a state grows in each iteration; None where it is no counter, or where something else reads it."""
    result, read = loop.outputs[index], loop.reads[index]
    value = value_of(result)
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        return None
    adds = (operator.add, torch.add, "add")
    if result.target not in adds or len(result.args) != 2 or result.kwargs or result.args[0] is not read:
        return None
    segment = set(loop.segment(-1))
    step = result.args[1]
    alone = all(user is result for user in read.users if user in segment) and not any(user in segment for user in result.users)
    return step if type(step) is int and alone else None


def _take_out(graph: fx.Graph, loop: Loop, index: int, step: int) -> None:
    result, chain = loop.outputs[index], set(loop.nodes)
    with graph.inserting_before(loop.anchor):
        final = graph.call_function(torch.add, (loop.initial[index], step * loop.count))
    final.meta = dict(result.meta)
    result.replace_all_uses_with(final, delete_user_cb=lambda user: user not in chain)
    loop.carried = (*loop.carried[:index], *loop.carried[index + 1 :])
    loop.initial = (*loop.initial[:index], *loop.initial[index + 1 :])
