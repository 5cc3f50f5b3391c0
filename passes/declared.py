"""Find the regions that capture marked: one application of the body between `enter` and `leave`."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from deq_compile.markers import enter, leave, untold
from deq_compile.report import Reason, Skipped
from deq_compile.torch_parts import assert_scalar, check_size

from .ambient import AUTOCAST_TARGETS, GRAD_TARGETS
from .base import Loop, Pass, PassContext, describe, foreign_among, inside_transforms, location_of, value_of
from .exits import erase_unused


@dataclasses.dataclass
class Declared(Loop):
    """A region whose body was traced once: one segment, which reads the results of `entry` and feeds `exit`."""

    entry: fx.Node | None = None
    exit: fx.Node | None = None
    exits: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)  # of the loop it was made from

    @property
    def declared(self) -> bool:
        return True

    @property
    def kind(self) -> str:
        return self.form

    @property
    def passages(self) -> set[tuple[Any, ...]]:
        return self.exits

    @property
    def first(self) -> fx.Node:
        assert self.entry is not None
        return self.entry

    @property
    def reads(self) -> list[fx.Node]:
        assert self.exit is not None
        return list(self.exit.args[1])  # type: ignore[arg-type]

    @property
    def outputs(self) -> list[fx.Node]:
        assert self.exit is not None
        return list(self.exit.args[0])  # type: ignore[arg-type]

    @property
    def uses(self) -> list[list[fx.Node]]:
        return [self._items(i) for i in range(len(self.outputs))]

    @property
    def about(self) -> list[fx.Node]:
        return self._items(len(self.outputs))

    def _items(self, index: int) -> list[fx.Node]:
        assert self.exit is not None
        return [user for user in self.exit.users if user.args[1] == index]

    @property
    def anchor(self) -> fx.Node:
        assert self.exit is not None
        return self.exit

    @property
    def erased(self) -> list[fx.Node]:
        assert self.entry is not None
        assert self.exit is not None
        # what the body reads and does not change may have been computed under an autocast that stands inside of it
        body = [node for node in self.nodes if node.target not in AUTOCAST_TARGETS]
        return [self.entry, *self.reads, *body, self.exit, *self.exit.users]

    @property
    def location(self) -> Any:
        return location_of(self.entry) if self.entry is not None else super().location


_ASSERTS = (assert_scalar, check_size, torch.ops.aten.sym_constrain_range_for_size.default)
_COMPARISONS = (operator.ge, operator.le, operator.gt, operator.lt, operator.eq, operator.ne)


class FindDeclared(Pass):
    name = "find_declared"

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        for node in list(graph.nodes):
            if node.target is not leave:
                continue
            found = region_at(graph, node)
            if isinstance(found, Declared):
                context.loops.append(found)
            else:
                context.skip(found)
        return len(context.loops)


def region_at(graph: fx.Graph, exit: fx.Node) -> Declared | Skipped:
    """The region that ends at a `leave`, or why it is none."""
    results, entered, site = exit.args
    items = list(entered) if isinstance(entered, tuple | list) else []
    entry = items[0].args[0] if items and items[0].target is operator.getitem else None
    if not isinstance(entry, fx.Node) or entry.target is not enter or entry.args[1] != site:
        return Skipped(Reason.NOT_CAUGHT, location_of(exit), "", 1)
    _one_read_each(graph, entry, items)

    found = _between(graph, entry, exit, items)
    if isinstance(found, Skipped):
        return found
    nodes, inside = found
    assert isinstance(results, tuple | list)
    ends: list[Any] = list(results)
    why = _no_region(graph, entry, (*items, *nodes), list(zip(items, ends, strict=True)))
    if why is not None:
        return why
    invariants = dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in inside)
    invariants |= dict.fromkeys(node for node in ends if node not in inside)
    return Declared(
        nodes=nodes,
        period=len(nodes),
        count=1,
        carried=(),
        initial=tuple(entry.args[0]),  # type: ignore[arg-type]
        invariants=tuple(invariants),
        form=str(entry.args[2]),
        hints=dict(entry.args[3]),  # type: ignore[arg-type]
        options=dict(entry.args[4]),  # type: ignore[arg-type]
        notes=(str(entry.args[5]),) if entry.args[5] else (),
        entry=entry,
        exit=exit,
    )


def drop_untold(graph: fx.Graph, context: PassContext) -> None:
    """Erase what stands for a tensor of the user's solver that no solve of ours has. Where somebody reads it, it stays, and the
    reason is given."""
    for node in [node for node in graph.nodes if node.target is untold]:
        readers, asserted = _readers(node)
        if readers:
            detail = f"{describe(readers[0])} reads a tensor that only the solver itself can return"
            context.skip(Skipped(Reason.SOLVER, location_of(node), detail))
            continue
        for check in asserted:
            condition = check.args[0]
            graph.erase_node(check)
            erase_unused(graph, condition)
        erase_unused(graph, node)


def _readers(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Who reads what stands for an unknown tensor, or its size; and what only asserts something of its size."""
    size, asserted = node.args[1], []
    readers = list(node.users)
    stack = [user for user in size.users if user is not node] if isinstance(size, fx.Node) else []
    while stack:
        user = stack.pop()
        if user.target in _ASSERTS:
            asserted.append(user)
        elif isinstance(value_of(user), torch.SymBool) or user.target in _COMPARISONS:
            stack += user.users
        else:
            readers.append(user)
    return readers, asserted


def _skip(reason: Reason, node: fx.Node, entry: fx.Node, detail: str) -> Skipped:
    place = location_of(node)
    return Skipped(reason, place if place.file else location_of(entry), detail, 1)


def _between(
    graph: fx.Graph, entry: fx.Node, exit: fx.Node, items: list[fx.Node]
) -> tuple[list[fx.Node], set[fx.Node]] | Skipped:
    """The nodes between an `enter` and its `leave` that depend on the state, and those with the state's reads; or why not."""
    nodes, inside, between = [], set(items), False
    for node in graph.nodes:
        between = (between or node is entry) and node is not exit
        if not between or node in inside or node is entry:
            continue
        if node.target is enter:
            return _skip(Reason.NESTED_EXIT, node, entry, str(node.args[2]))
        if node.target in AUTOCAST_TARGETS + GRAD_TARGETS or any(a in inside for a in node.all_input_nodes):
            inside.add(node)
            nodes.append(node)
    for node in (*items, *nodes):
        for user in node.users:
            if user not in inside and user is not exit:
                return _skip(Reason.ESCAPES, node, entry, f"used by {describe(user)}")
    return nodes, inside


def _no_region(
    graph: fx.Graph, entry: fx.Node, nodes: tuple[fx.Node, ...], states: list[tuple[fx.Node, fx.Node]]
) -> Skipped | None:
    """Why nodes are no region that maps each state to its result; None where they are one."""
    strange = foreign_among((*nodes, *(result for _, result in states)))
    if strange is not None:
        return _skip(Reason.NOT_PLAIN, strange[0], entry, strange[1])
    if entry in inside_transforms(graph):
        return _skip(Reason.NOT_PLAIN, entry, entry, "inside of a torch.func transform")
    for state, result in states:
        before, after = _meta(value_of(state)), _meta(value_of(result))
        if before != after:
            return _skip(Reason.DRIFT, result, entry, f"from {before} to {after}")
    return None


def _meta(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _one_read_each(graph: fx.Graph, entry: fx.Node, items: list[fx.Node]) -> None:
    """Let every read of one state be the node that `leave` names."""
    for user in list(entry.users):
        first = next((item for item in items if item.args[1] == user.args[1]), None)
        if first is not None and first is not user:
            user.replace_all_uses_with(first)
            graph.erase_node(user)
