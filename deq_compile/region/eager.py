"""A declared fixed point in plain eager mode: the solver and the adjoint of the compiled path, autograd for the products.

The fixed point is evaluated once more with gradients recorded, and its result handed on through a node whose backward
replaces the cotangent q by the adjoint w = q + J^T w. Whatever f reads, closures included, thereby gets its implicit gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deq_compile.config import Config

from . import graphs
from .backward import BACKWARDS, AdjointCall
from .body import BodySpec, Linearised, Runner
from .call import Call, Prepared
from .layout import Layout
from .modes import Ambient
from .op import once
from .run import Result, adjoint, run
from .site import RegionSpec, Site
from .surroundings import for_each_of_batch, is_batched
from .verdict import decide_rows

Body = Callable[[list[Tensor]], Sequence[Tensor]]


class Solved(NamedTuple):
    """The state tensors of a fixed point, and what the solve came to."""

    states: list[Tensor]
    result: Result


# Sites of one function that are remembered: options may change from call to call, as an annealed tolerance does.
MOST_SITES = 64
_sites: weakref.WeakKeyDictionary[Any, dict[Any, Site]] = weakref.WeakKeyDictionary()


def solve_eagerly(f: Body, state0: Sequence[Tensor], config: Config, *, key: Any, where: str) -> Solved:
    """The fixed point of `f` from `state0`, attached to the autograd graph of what f reads.

    Args:
        f: list of state tensors -> tensors of the same shapes.
        state0: real floating-point tensors; left as they are.
        config: settled options.
        key: what stands for f from call to call (its code object); facts learnt about it are kept under that.
        where: the user's file and line.

    Raises:
        ValueError: a backward that is the gradient of a loop's own iterates; or shapes that contradict ``batch``.
    """
    if BACKWARDS[config.backward].gradient == "loop":
        raise ValueError(
            f"fixed point at {where}: backward={config.backward!r} is the gradient of the user's own loop, and a declared fixed "
            "point has none. Fix: backward='exact'"
        )
    site = _site(key, state0, config, where)
    here = graphs.current_device(state0[0].device)

    def as_given(states: list[Tensor]) -> Sequence[Tensor]:
        with graphs.made_current(here):  # the user's code runs as it would without a solver around it
            return f(states)

    with graphs.made_current(state0[0].device):
        call = Call(site, state0, (), (), _prepare(site, as_given, state0))
        found, layout = run(call), call.layout
    if not torch.is_grad_enabled():
        return Solved(layout.outputs(found.z), found)
    starts = [s.detach().requires_grad_() for s in layout.unflatten(found.z)]
    inputs = [s.view_as(s) for s in starts]  # no leaves: hooks of modules do not expect those under `autograd.grad`
    images = list(f(inputs))
    if not _reads_more_than(images, starts):
        return Solved(layout.outputs(found.z), found)
    for z in starts:  # the engine also brings J^T w here, where nobody wants it
        z.register_post_accumulate_grad_hook(_forget)
    attached = _Attached(site, _Images(layout, inputs, images), found)
    # of its own memory: the user may write to it, and `inputs` are views of z
    states = layout.outputs(found.z, fresh=True)
    return Solved(list(_Implicit.apply(attached, states, *images)), found)


class _Function(Runner):
    """The user's own function as the body of a region; what it reads beside the state it finds for itself."""

    def __init__(self, f: Body, layout: Layout) -> None:
        self.f, self.layout = f, layout

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return self.layout.flatten(self.f(self.layout.unflatten(z)))

    def evaluate_and_linearise(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Tensor, Linearised]:
        raise NotImplementedError("the attached evaluation of f gives its products")


def _prepare(site: Site, f: Body, state0: Sequence[Tensor]) -> Prepared:
    def body(layout: Layout) -> Callable[[Tensor], Tensor]:
        runner = _Function(f, layout)
        return lambda z: runner.apply(z, ())

    rows = decide_rows(site, state0, body)
    layout = site.spec.layout([s.shape for s in state0], rows=rows)
    return Prepared(rows, layout, _Function(f, layout))


def _site(key: Any, state0: Sequence[Tensor], config: Config, where: str) -> Site:
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


def _reads_more_than(images: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether anything but `inputs` that requires gradients went into `images`."""
    own = {id(z) for z in inputs}
    stack = [image.grad_fn for image in images if image.grad_fn is not None]
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return False


def _forget(z: Tensor) -> None:
    z.grad = None


class _Images(Linearised):
    """f, evaluated at the fixed point with gradients recorded: its products by autograd. The gradients of what f reads come from
    this evaluation itself, so that w stands for them where they are measured."""

    def __init__(self, layout: Layout, inputs: list[Tensor], images: list[Tensor]) -> None:
        self.layout, self.inputs, self.images = layout, inputs, images

    def vjp(self, w: Tensor) -> Tensor:
        cotangents = [
            c.to(image.dtype) for c, image in zip(self.layout.unflatten(w), self.images, strict=True) if image.requires_grad
        ]
        images = [image for image in self.images if image.requires_grad]
        grads = torch.autograd.grad(images, self.inputs, cotangents, retain_graph=True, allow_unused=True)
        return self.layout.flatten([torch.zeros_like(z) if g is None else g for g, z in zip(grads, self.inputs, strict=True)])

    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        return self.vjp(w), [w]


class _Attached:
    """What the backward of one fixed point needs."""

    def __init__(self, site: Site, linear: _Images, found: Result) -> None:
        self.site, self.linear, self.factors, self.serial = site, linear, found.saved.factors, found.serial
        self.recycled = found.saved.recycled

    def adjoint_of(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """What goes on to the attached evaluation of f, for the cotangents of the fixed point."""
        linear = self.linear
        given = [torch.zeros_like(z) if c is None else c for c, z in zip(cotangents, linear.inputs, strict=True)]
        mode = BACKWARDS[self.site.spec.config.backward]
        call = AdjointCall(self.site, self.factors, inside=graphs.capturing(), recycled=self.recycled)
        w = adjoint(mode, linear, linear.layout.flatten(given), call, self.serial).w
        return [g.to(image.dtype) for g, image in zip(linear.layout.unflatten(w), linear.images, strict=True)]


class _Implicit(torch.autograd.Function):
    """The fixed point; its cotangent q goes on as w to one attached evaluation of f."""

    @staticmethod
    def forward(ctx: Any, attached: _Attached, states: list[Tensor], *images: Tensor) -> tuple[Tensor, ...]:
        ctx.attached = attached
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        attached: _Attached = ctx.attached
        if all(c is None for c in cotangents):
            return (None, None, *([None] * len(cotangents)))
        with torch.no_grad(), graphs.made_current(attached.linear.inputs[0].device):
            work = attached.adjoint_of
            found = for_each_of_batch(work, cotangents) if is_batched(cotangents) else work(cotangents)
        if torch.is_grad_enabled():
            found = once(found, (*attached.linear.images, *cotangents))
        return (None, None, *found)
