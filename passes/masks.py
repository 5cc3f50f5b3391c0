"""Take masks that freeze converged samples out of the state of a loop: at a fixed point nothing is left for them to hold.

    new = f(z)
    z = torch.where(done[:, None], z, new)
    done = done | ((new - z).norm(dim=1) < tol)     # or an `active` mask, by `&`
    if done.all(): break                            # or a fixed count

Where the mask starts with nothing frozen, does nothing else, and freezes what has converged (tried out on numbers, as the test
of a loop is), the loop is one of z = new, and a test of the mask one of this iteration's own comparison.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deq_compile.markers import is_passage, may_exit

from .base import Loop, Pass, PassContext, value_of
from .exits import exits_when

_OR = (operator.or_, operator.ior, torch.logical_or, torch.bitwise_or, "logical_or", "bitwise_or", "__or__")
_AND = (operator.and_, operator.iand, torch.logical_and, torch.bitwise_and, "logical_and", "bitwise_and", "__and__")
_VIEWS = (operator.getitem, torch.unsqueeze, torch.reshape, "unsqueeze", "view", "reshape", "expand", "expand_as", "view_as")
_ALL_FALSE = (torch.zeros, torch.zeros_like, "new_zeros")
_ALL_TRUE = (torch.ones, torch.ones_like, "new_ones")


@dataclass(frozen=True)
class _Mask:
    """Places in a segment (offsets): the mask's update, the comparison in it, the choice of the state, and its new value; which
    states these are; and whether the mask is one of what is done."""

    update: int
    fresh: int
    choice: int
    new: int
    index: int
    chosen: int
    done: bool


class Masks(Pass):
    name = "masks"

    def __init__(self, owner: fx.GraphModule) -> None:
        self.owner = owner

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        taken = 0
        for loop in context.loops:
            for index in reversed(range(len(loop.carried))):
                mask = _read(loop, index)
                if mask is not None and _freezes(self.owner, loop, mask):
                    _take_out(graph, loop, mask)
                    taken += 1
        return taken


def _read(loop: Loop, index: int) -> _Mask | None:
    """The mask that a state is; None where it is none, or does more."""
    update, read, segment = loop.outputs[index], loop.reads[index], loop.segment(-1)
    value, inside = value_of(update), set(segment)
    if not isinstance(value, Tensor) or value.dtype != torch.bool or len(update.args) != 2 or update.kwargs:
        return None
    done, fresh = update.target in _OR, next((a for a in update.args if a is not read), None)
    wanted = _ALL_FALSE if done else _ALL_TRUE
    if update.target not in _OR + _AND or read not in update.args or not isinstance(fresh, fx.Node) or fresh not in inside:
        return None
    if loop.initial[index].target not in wanted or _goes_on(loop, update, inside):
        return None
    choices = _choices(read, update, inside)
    if len(choices) != 1:
        return None
    (choice,) = choices
    chosen = next((i for i, out in enumerate(loop.outputs) if out is choice), None)
    if chosen is None or choice.target is not torch.where or len(choice.args) != 3:
        return None
    old, new = (choice.args[1], choice.args[2]) if done else (choice.args[2], choice.args[1])
    if old is not loop.reads[chosen] or new not in inside or _reaches(new, read, inside) or _reaches(fresh, read, inside, choice):
        return None
    at = {node: i for i, node in enumerate(segment)}
    return _Mask(at[update], at[fresh], at[choice], at[new], index, chosen, done)  # type: ignore[index]


def _goes_on(loop: Loop, update: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether the mask as it is after an iteration goes into anything but the loop's own tests and its next iteration."""
    seen: set[fx.Node] = set()
    stack = [update]
    while stack:
        node = stack.pop()
        outside = any(user not in inside for user in node.users)
        if outside or (node in loop.outputs and node is not update):
            return True
        stack += [user for user in node.users if user not in seen and user.target is not may_exit]
        seen.update(node.users)
    return False


def _choices(read: fx.Node, update: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """What reads a mask, through views, beside its update."""
    found: list[fx.Node] = []
    stack = [user for user in read.users if user in inside and user is not update]
    while stack:
        user = stack.pop()
        if user.target in _VIEWS and _keeps_order(user):
            stack += [further for further in user.users if further in inside]
        else:
            found.append(user)
    return found


def _keeps_order(view: fx.Node) -> bool:
    """Whether a view only adds dimensions: no sample is taken for another."""
    if view.target is not operator.getitem:
        return True
    places = view.args[1] if isinstance(view.args[1], tuple) else (view.args[1],)
    return all(p is None or p is Ellipsis or p == slice(None) for p in places)


def _reaches(node: Any, source: fx.Node, inside: set[fx.Node], without: fx.Node | None = None) -> bool:
    """Whether a node is computed from another one, within a segment; by another way than through `without`."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is source:
            return True
        if current in seen or current not in inside or current is without:
            continue
        seen.add(current)
        stack += current.all_input_nodes
    return False


def _freezes(owner: fx.GraphModule, loop: Loop, mask: _Mask) -> bool:
    """Whether what the mask freezes has converged: its comparison is a test of how far z and f(z) are apart."""
    segment = loop.segment(-1)
    images = [segment[mask.new] if i == mask.chosen else out for i, out in enumerate(loop.outputs)]
    # the comparison may look at the choice, which is the new value where nothing is frozen
    return exits_when(owner, loop, segment[mask.fresh], images, {segment[mask.choice]: segment[mask.new]}, mask.done)


def _take_out(graph: fx.Graph, loop: Loop, mask: _Mask) -> None:
    for k in range(loop.count):
        segment = loop.segment(k)
        segment[mask.choice].replace_all_uses_with(segment[mask.new])
        segment[mask.update].replace_all_uses_with(segment[mask.fresh])
    places = [mask.new if i == mask.chosen else c for i, c in enumerate(loop.carried) if i != mask.index]
    loop.initial = tuple(node for i, node in enumerate(loop.initial) if i != mask.index)
    loop.carried = tuple(places)
    _erase_dead(graph, loop)


def _erase_dead(graph: fx.Graph, loop: Loop) -> None:
    """Erase what nobody reads any more, in all segments alike."""
    segments = [loop.segment(k) for k in range(loop.count)]
    alive = list(range(loop.period))
    for offset in reversed(range(loop.period)):
        nodes = [segment[offset] for segment in segments]
        if offset not in loop.carried and not any(n.users or n.is_impure() or is_passage(n.target) for n in nodes):
            for node in nodes:
                graph.erase_node(node)
            alive.remove(offset)
    loop.nodes = [segment[offset] for segment in segments for offset in alive]
    loop.period = len(alive)
    loop.carried = tuple(alive.index(offset) for offset in loop.carried)
