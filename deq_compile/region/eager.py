"""A declared fixed point in plain eager mode: the solver and the adjoint of the compiled path, autograd for the products."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deq_compile.config import Config
from deq_compile.torch_parts import forward_mode

from . import graphs
from .attach import Attachment, Body, attach
from .backward import BACKWARDS, of_steps
from .body import BodySpec, Linearised, Runner
from .call import Call, Prepared, arranged
from .layout import Layout
from .modes import Ambient
from .run import run
from .sharded_calls import held_once
from .site import RegionSpec, Site
from .steps import Solved, solve_by_steps
from .tangent import primals, with_tangents

# Sites of one function that are remembered: options may change from call to call, as an annealed tolerance does.
MOST_SITES = 64
_sites: weakref.WeakKeyDictionary[Any, dict[Any, Site]] = weakref.WeakKeyDictionary()


def solve_eagerly(f: Body, state0: Sequence[Tensor], config: Config, *, key: Any, where: str, derivatives: int = 1) -> Solved:
    """The fixed point of `f` from `state0`, attached to the autograd graph of what f reads.

    Args:
        f: list of state tensors -> tensors of the same shapes.
        state0: real floating-point tensors; left as they are.
        config: settled options.
        key: what stands for f from call to call (its code object); facts learnt about it are kept under that.
        where: the user's file and line.
        derivatives: how many times the result can be differentiated.

    Raises:
        ValueError: a backward that is the gradient of a loop's own iterates, or an approximation that is to be differentiated
            again; or shapes that contradict ``batch``.
    """
    if BACKWARDS[config.backward].gradient == "loop":
        raise ValueError(
            f"fixed point at {where}: backward={config.backward!r} is the gradient of the user's own loop, and a declared fixed "
            "point has none. Fix: backward='exact'"
        )
    if derivatives > 1 and BACKWARDS[config.backward].gradient != "implicit":
        raise ValueError(
            f"fixed point at {where}: expected an implicit gradient for derivatives={derivatives}, got backward="
            f"{config.backward!r}, whose own derivative means nothing. Fix: backward='exact'"
        )
    site = region_of(key, config, where, state0)
    if of_steps(config):
        return solve_by_steps(f, state0, site)
    f = held_once(f, where)
    here = graphs.current_device(state0[0].device)

    def as_given(states: list[Tensor]) -> Sequence[Tensor]:
        with graphs.made_current(here):  # the user's code runs as it would without a solver around it
            return f(states)

    duals = forward_mode()
    if duals:  # what f reads may carry tangents: those are no part of the solve
        state0, values = primals(state0), as_given
        as_given = lambda states: primals(values(states))  # noqa: E731
    with graphs.made_current(state0[0].device):
        rows, layout = arranged(site, as_given, state0)
        call = Call(site, state0, (), (), Prepared(rows, layout, _Function(as_given, layout)))
        found = run(call)
    if torch.is_grad_enabled():
        saved = found.saved
        warm = saved.warm if derivatives == 1 else None
        known = Attachment(site, layout, saved.factors, found.serial, saved.recycled, derivatives, warm)
        states = attach((lambda states: primals(f(states))) if duals else f, found.z, known, derivatives)
    else:
        states = layout.outputs(found.z)
    return Solved(with_tangents(f, states, site, layout) if duals else states, found)


class _Function(Runner):
    """The user's own function as the body of a region; what it reads beside the state it finds for itself."""

    def __init__(self, f: Body, layout: Layout) -> None:
        self.f, self.layout = f, layout

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return self.layout.flatten(self.f(self.layout.unflatten(z)))

    def evaluate_and_linearise(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Tensor, Linearised]:
        raise NotImplementedError("the attached evaluation of f gives its products")


def region_of(key: Any, config: Config, where: str, state0: Sequence[Tensor]) -> Site:
    """The site of a call, not registered: what is known of it lives as long as the user's code does."""
    ambient = Ambient.now()
    facts = (where, config.key(), ambient, tuple((s.dtype, s.dim()) for s in state0))
    known = _sites.setdefault(key, {})
    if facts not in known:
        orders = tuple(tuple(range(s.dim())) for s in state0)
        spec = RegionSpec(
            body=BodySpec(call=lambda *_: (), hash="eager", ambient=ambient, inner="eager"),
            dtypes=tuple(s.dtype for s in state0),
            orders=orders,
            iterations=None,
            grad=ambient.grad,
            config=config,
            where=where,
        )
        if len(known) >= MOST_SITES:
            known.pop(next(iter(known)), None)
        known[facts] = Site(f"eager-{where}", spec)
    return known[facts]


def clear() -> None:
    """Forget what was learnt about functions."""
    _sites.clear()
