"""Write a `torch.while_loop` out as a chain of segments with exits, the form in which loops that depend on data arrive.

A counter (k + 1, read by the condition and by nothing else) says how often the loop may run; it becomes the cap of the solve.
The backend goes back to the operator itself where no region comes of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from deq_compile.markers import UNROLLED, may_exit
from deq_compile.report import Reason, Skipped

from .base import Pass, PassContext, location_of, value_of

SITE = "while_loop:"
_AND = (operator.and_, torch.logical_and, torch.bitwise_and)
_BELOW = (operator.lt, torch.lt, "lt")


class UnrollWhile(Pass):
    name = "unroll_while"

    def __init__(self, owner: fx.GraphModule, skip: set[str]) -> None:
        self.owner, self.skip = owner, skip

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        unrolled = 0
        for node in list(graph.nodes):
            if node.target is not torch.ops.higher_order.while_loop or SITE + node.name in self.skip:
                continue
            why = self._unroll(graph, node)
            if why is None:
                unrolled += 1
            else:
                context.skip(Skipped(*why))
        return unrolled

    def _unroll(self, graph: fx.Graph, node: fx.Node) -> tuple[Reason, Any, str] | None:
        arguments: Any = node.args
        condition, body = (getattr(self.owner, str(a.target)) for a in arguments[:2])
        carried, extra = list(arguments[2]), list(arguments[3])
        counters = {i for i in range(len(carried)) if _is_counter(body.graph, i)}
        taken_apart = all(user.target is operator.getitem for user in node.users)
        for user in node.users:
            if not taken_apart or user.args[1] in counters:
                return Reason.COUNTER, location_of(user), "the counter of a while_loop"
        terms = list(_terms(_output(condition.graph)))
        counted = [term for term in terms if _reads(term) and _reads(term) <= {f"{i}" for i in counters}]
        tests = [term for term in terms if term not in counted]
        if len(tests) != 1:
            return Reason.EXIT_TEST, location_of(node), f"{len(tests)} conditions of a while_loop on its tensors"
        cap = max((_bound(term, carried) for term in counted), default=0)
        state = list(carried)
        with graph.inserting_before(node):
            for _ in range(UNROLLED):
                (predicate,) = _inline(graph, condition.graph, [*state, *extra], [tests[0]])
                graph.call_function(may_exit, (predicate, SITE + node.name, 0, False, cap)).meta = {
                    k: v for k, v in node.meta.items() if k != "example_value"
                }
                results = _inline(graph, body.graph, [*state, *extra], _output(body.graph))
                state = [old if i in counters else new for i, (old, new) in enumerate(zip(state, results, strict=True))]
        for user in list(node.users):
            user.replace_all_uses_with(state[int(user.args[1])])  # type: ignore[arg-type]
            graph.erase_node(user)
        graph.erase_node(node)
        for name in arguments[:2]:
            if not name.users:
                graph.erase_node(name)
        return None


def _output(graph: fx.Graph) -> Any:
    return next(node for node in graph.nodes if node.op == "output").args[0]


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _is_counter(body: fx.Graph, index: int) -> bool:
    """Whether a carried value becomes itself plus a constant, and goes nowhere else."""
    own, after = _placeholders(body)[index], _output(body)[index]
    if not isinstance(after, fx.Node) or after.target not in (operator.add, torch.add, "add"):
        return False
    constant = len(after.args) > 1 and isinstance(after.args[1], int)
    return constant and after.args[0] is own and list(own.users) == [after] and [u.op for u in after.users] == ["output"]


def _terms(node: Any) -> Iterator[fx.Node]:
    """The parts of a conjunction."""
    if isinstance(node, tuple | list):
        for part in node:
            yield from _terms(part)
    elif isinstance(node, fx.Node) and node.target in _AND:
        for part in node.args:
            yield from _terms(part)
    elif isinstance(node, fx.Node):
        yield node


def _reads(node: fx.Node) -> set[str]:
    """Positions of the placeholders that a node of the condition depends on."""
    places = {p: str(i) for i, p in enumerate(_placeholders(node.graph))}
    seen, stack = {node}, [node]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return {places[n] for n in seen if n in places}


def _bound(term: fx.Node, carried: Sequence[Any]) -> int:
    """Iterations that `k < N` allows, where k starts at a constant; 0 where that is not known."""
    if term.target not in _BELOW or len(term.args) < 2 or not isinstance(term.args[1], int):
        return 0
    places: list[Any] = list(_placeholders(term.graph))
    start = carried[places.index(term.args[0])] if term.args[0] in places else None
    first = start.args[0] if isinstance(start, fx.Node) and start.target is torch.tensor else start
    return max(term.args[1] - first, 0) if isinstance(first, int) else 0


def _inline(graph: fx.Graph, part: fx.Graph, arguments: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
    """Copy what `wanted` needs of a subgraph into a graph."""
    env: dict[fx.Node, Any] = dict(zip(_placeholders(part), arguments, strict=True))
    needed = _ancestors(wanted)
    for node in part.nodes:
        if node in needed and node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, env.__getitem__)
            value = value_of(node)
            if isinstance(value, torch.Tensor):
                with torch.no_grad():  # a value of its own: copies share nothing
                    env[node].meta["example_value"] = value.detach().clone().requires_grad_(value.requires_grad)
    return [env[w] if isinstance(w, fx.Node) else w for w in wanted]


def _ancestors(nodes: Sequence[Any]) -> set[fx.Node]:
    found = {node for node in nodes if isinstance(node, fx.Node)}
    stack = list(found)
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in found:
                found.add(a)
                stack.append(a)
    return found
