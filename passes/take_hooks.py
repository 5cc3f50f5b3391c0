"""Make a no-grad solve, its attached step and the hook that solves the adjoint one region with the implicit gradient.

    with no_grad: z* = solve(f, z0)          ->   z* = solve(f, z0), gradients recorded through f
    z = f(z*);  z.register_hook(w = q + J^T w)

Three computations must be one and the same: the body of the solve, the attached step, and what the hook differentiates.
The new region's body is the attached step, since that one was traced with gradients on. Its cotangent is solved for at the
hook's own tolerance; what the hook would have written elsewhere (statistics) is not written.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from deq_compile.markers import adjoint_hook, adjoint_input, enter, leave
from deq_compile.report import Reason, Skipped

from .base import Loop, Pass, PassContext, location_of, value_of
from .copies import copies_of, is_copy, source_of
from .declared import region_at
from .exits import erase_unused
from .replace import move_behind

# Capture took the hook for a solve: more products than the default cap, since its tolerance may be tighter than ours.
PRODUCTS = 60


@dataclasses.dataclass
class _Solve:
    """A solve without gradients: its result, the image and the read of its body, and what it starts from and says."""

    solved: fx.Node
    image: fx.Node
    read: fx.Node
    entry: tuple[Any, ...]  # the arguments of `enter`
    exit: fx.Node | None = None  # the `leave` of a marked solve
    loop: Loop | None = None  # or the loop


class TakeHooks(Pass):
    """Once for the solves that capture marked, and once, `loops`, for loops that a test ends; what it takes of those
    changes places with them in the context."""

    name = "take_hooks"

    def __init__(self, loops: bool = False) -> None:
        self.loops = loops

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        taken = 0
        for hook in [node for node in graph.nodes if node.target is adjoint_hook]:
            why = "hooks='keep'" if context.keep_hooks([hook]) else self._take(graph, hook, context)
            if why is None:
                taken += 1
            elif (self.loops or why != _NOT_YET) and not hook.meta.get(_TOLD):
                hook.meta[_TOLD] = True
                context.skip(Skipped(Reason.HOOK, location_of(hook), why, 1))
        for node in reversed(list(graph.nodes)):
            if node.target is adjoint_input and not node.users:
                erase_unused(graph, node)
        return taken

    def _take(self, graph: fx.Graph, hook: fx.Node, context: PassContext) -> str | None:
        """Why a hook stays; None where it was taken over."""
        arguments: Any = hook.args
        z, image, start, _, tol, terms = arguments
        solve = _loop_before(z, context.loops) if self.loops else _marked_before(z)
        if solve is None:
            return _NOT_YET
        solved = solve.solved

        def is_state(node: fx.Node) -> bool:
            return source_of(node) is solved

        attached = _between(z, is_state)
        if not _same(z, image, is_state, lambda node: source_of(node, start) is start):
            return "what it differentiates is another computation than the attached step"
        if (why := _entangled(solve, z, attached, is_state)) is not None:
            return why
        end = _merge(graph, hook, z, solve, attached, *_backward(float(tol), int(terms)))
        if solve.loop is not None:
            region = region_at(graph, end)
            if isinstance(region, Skipped):
                raise RuntimeError(f"a step was merged with its loop, and is no region: {region}")
            region.tests, region.exits, region.lead = solve.loop.tests, solve.loop.passages, solve.loop.lead
            context.loops = [region if loop is solve.loop else loop for loop in context.loops]
            for node in reversed(solve.loop.nodes):
                graph.erase_node(node)
        return None


def _entangled(solve: _Solve, z: fx.Node, attached: set[fx.Node], is_state: Callable[[fx.Node], bool]) -> str | None:
    """Why the attached step cannot be taken together with the solve before it; None where it can."""
    if not _same(z, solve.image, is_state, lambda node: node is solve.read):
        return "the solve before it has another body than the attached step"
    if any(user not in attached for node in attached if node is not z for user in node.users):
        return "an intermediate of the attached step is used elsewhere"
    chain = set(solve.loop.nodes) if solve.loop is not None else set()
    copies = (solve.solved, *copies_of(solve.solved))
    others = [u for node in copies for u in node.users if u not in attached | chain and not is_copy(u)]
    if solve.exit is not None:
        others += [user for user in solve.exit.users if user is not solve.solved]
    if not _downstream(others).isdisjoint(attached):
        return "the attached step depends on what the solver said of itself"
    return None


_TOLD = "deq_compile_told"
_NOT_YET = "the step that the hook is registered on does not follow a solve that was found"


def _marked_before(z: fx.Node) -> _Solve | None:
    """The marked solve that `z` is computed from, if that is the only one."""
    found: dict[fx.Node, None] = {}
    seen, stack = {z}, [z]
    while stack:
        node = stack.pop()
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target is leave:
            found[node] = None
            continue
        for a in node.all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    states = [node for node in found if node.args[1] == 0 and len(node.args[0].args[0]) == 1]  # type: ignore[union-attr,arg-type]
    if not len(states) == len(found) == 1:
        return None
    exit: Any = states[0].args[0]
    (image,), (read,) = exit.args[0], exit.args[1]
    return _Solve(states[0], image, read, read.args[0].args, exit=exit)


def _loop_before(z: fx.Node, loops: Sequence[Loop]) -> _Solve | None:
    """The loop with a test that `z` is computed from. A loop of fixed count has a result of its own, which its hook may
    not change; there the hook stays."""
    ancestors, stack = {z}, [z]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in ancestors:
                ancestors.add(a)
                stack.append(a)
    found = [loop for loop in loops if loop.tests and len(loop.outputs) == 1 and loop.outputs[0] in ancestors]
    if len(found) != 1:
        return None
    (loop,) = found
    site = str(next(iter(loop.passages))[0])
    entry = (loop.initial, site, loop.kind, tuple(loop.hints.items()), (), "")
    return _Solve(loop.outputs[0], loop.outputs[0], loop.reads[0], entry, loop=loop)


def _between(z: fx.Node, is_state: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes from the state to `z` that depend on the state, `z` among them, the state's copies not."""
    depends: dict[fx.Node, bool] = {}

    def look(node: fx.Node) -> bool:
        if is_state(node):
            return True
        if node not in depends:
            depends[node] = False
            depends[node] = sum(look(a) for a in node.all_input_nodes) > 0  # all of them are looked at
        return depends[node]

    look(z)
    return {node for node, yes in depends.items() if yes}


def _same(a: fx.Node, b: fx.Node, state_a: Callable[[fx.Node], bool], state_b: Callable[[fx.Node], bool]) -> bool:
    """Whether two nodes compute the same of their states."""
    known: dict[tuple[fx.Node, fx.Node], bool] = {}

    def same(a: fx.Node, b: fx.Node) -> bool:
        if state_a(a) or state_b(b):
            return state_a(a) and state_b(b)
        a, b = source_of(a), source_of(b)  # where gradients end is no question here
        if (a, b) not in known:
            alike = a.op == b.op and a.target == b.target and a.op not in ("placeholder", "get_attr")
            known[a, b] = a is b or (alike and _spelled(a) == _spelled(b) and _all_same(a, b))
        return known[a, b]

    def _all_same(a: fx.Node, b: fx.Node) -> bool:
        pairs = zip(_arguments(a), _arguments(b), strict=True)
        return len(_arguments(a)) == len(_arguments(b)) and all(same(x, y) for x, y in pairs)

    return same(a, b)


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda a: found.append(a) or a)  # type: ignore[func-returns-value]
    return found


def _spelled(node: fx.Node) -> str:
    return str(fx.node.map_arg((node.args, node.kwargs), lambda a: "node"))


def _downstream(nodes: list[fx.Node]) -> set[fx.Node]:
    seen, stack = set(nodes), list(nodes)
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return seen


def _backward(tol: float, terms: int) -> tuple[tuple[tuple[str, Any], ...], str]:
    """What a hook does, as hints for the region, and in words."""
    if terms == 0:
        note = (
            f"the hook's adjoint solve is taken over, at its tolerance {tol:g}: what the hook stores is not written; "
            "hooks='keep' leaves it"
        )
        return (("backward_tol", tol), ("backward_max_iter", PRODUCTS)), note
    note = f"the hook's {terms} terms of the Neumann series are taken over; hooks='keep' leaves it"
    return ((("backward", "neumann"), ("backward_steps", terms)) if terms > 1 else (("backward", "jfb"),)), note


def _merge(
    graph: fx.Graph, hook: fx.Node, z: fx.Node, solve: _Solve, attached: set[fx.Node], more: tuple[Any, ...], note: str
) -> fx.Node:
    """Mark the attached step as the region, and take the old solve out; the new `leave`."""
    states, site, form, hints, options, _ = solve.entry
    solved, exit = solve.solved, solve.exit
    first = next(node for node in graph.nodes if node in attached)
    with graph.inserting_before(first):
        begin = graph.call_function(enter, (states, site, form, (*hints, *more, ("attached", True)), options, note))
        begin.meta = {k: v for k, v in (exit or solved).meta.items() if k != "example_value"}
        state = _item(graph, begin, 0, solved)
    for node in attached:
        for a in node.all_input_nodes:
            if source_of(a) is solved:
                node.replace_input_with(a, state)
    with graph.inserting_after(z):
        end = graph.call_function(leave, ((z,), (state,), site))
        end.meta = dict(begin.meta)
    with graph.inserting_after(end):
        found = _item(graph, end, 0, z)
    statistics = [user for user in exit.users if user.args[1] == 1] if exit is not None else []
    with graph.inserting_after(found):
        plain = graph.call_method("detach", (found,))  # the solve ran without gradients, and so did who read its result
        plain.meta = dict(solved.meta)
    if statistics:
        with graph.inserting_after(found):
            about = _item(graph, end, 1, statistics[0])
        for user in statistics:
            user.replace_all_uses_with(about)
    chain = set(solve.loop.nodes) if solve.loop is not None else set()
    z.replace_all_uses_with(found, delete_user_cb=lambda user: user is not end)
    hook.replace_all_uses_with(found)
    solved.replace_all_uses_with(plain, delete_user_cb=lambda user: user not in chain)
    reads = [a for a in hook.args[1:3] if isinstance(a, fx.Node)]
    graph.erase_node(hook)
    for node in (*reads, *(list(exit.users) if exit is not None else ())):
        erase_unused(graph, node)
    if exit is not None:
        erase_unused(graph, exit)
    move_behind(graph, plain)
    return end


def _item(graph: fx.Graph, source: fx.Node, index: int, like: fx.Node) -> fx.Node:
    item = graph.call_function(operator.getitem, (source, index))
    item.meta = {k: v for k, v in like.meta.items() if k != "example_value"}
    value: Any = value_of(like)
    if isinstance(value, torch.Tensor):
        item.meta["example_value"] = value
    return item
