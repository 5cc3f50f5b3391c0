"""The fixed point of a function that nobody traced, attached to autograd's graph of what the function reads.

The function is evaluated once more at the fixed point with gradients recorded, and its result handed on through a node whose
backward replaces the cotangent q by the adjoint w = q + J^T w. Whatever f reads, closures included, thereby gets its implicit
gradient. J and the gradients of what f reads are taken at z*, as if that were a number: right for one derivative.

For n derivatives there are n such nodes in a row, each with an evaluation of its own at the node before it:

    z* -> f -> y_1 -> f -> y_2 -> ... -> y_n          all of them equal z*

A first derivative of y_n goes no further back than its own evaluation: J^T w, which the engine brings on towards y_{n-1}, is no
part of it (the gate). Where that derivative was recorded, to be differentiated in turn, its own dependence on z* comes to
the gate as well, goes through, and finds the implicit gradient of y_{n-1}. The adjoint that it depends on is a fixed point too,
of w -> q + J^T w, and is attached in the same way, for one derivative less.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.torch_parts import graph_task

from . import graphs
from .backward import BACKWARDS, AdjointCall, Settled
from .body import Linearised
from .layout import Layout
from .op import once
from .pool import Recycled
from .run import adjoint
from .site import Site
from .surroundings import for_each_of_batch, is_batched
from .warm import Start

Body = Callable[[list[Tensor]], Sequence[Tensor]]
MOST_PENDING = 16
# Sites of adjoints that are fixed points to be differentiated, by those of the fixed points whose adjoints they are.
_twins: weakref.WeakKeyDictionary[Site, Site] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Attachment:
    """What is known of a fixed point: its region, how its state lies, what its solve has left, the number of its record,
    what earlier batches have left, how many derivatives the user has asked for, the last adjoint, and what the first backward has
    settled."""

    site: Site
    layout: Layout
    factors: Factors | None = None
    serial: int = 0
    recycled: Recycled | None = None
    derivatives: int = 1
    warm: Start | None = None
    settled: Settled = dataclasses.field(default_factory=Settled)


def attach(f: Body, z: Tensor, known: Attachment, levels: int) -> list[Tensor]:
    """The states of the fixed point z (B, D) of `f`, differentiable so many times by what f reads."""
    layout = known.layout
    starts = [s.detach().requires_grad_() for s in layout.unflatten(z)]
    states = [s.view_as(s) for s in starts]  # no leaves: hooks of modules do not expect those under `autograd.grad`
    for level in range(1, levels + 1):
        node = _Node(known, f, level)
        inputs = states if level == 1 else list(_Gate.apply(node.passage, *states))
        images = list(f(inputs))
        if level == 1:
            if not reads_more_than(images, starts):
                return layout.outputs(z)
            for s in starts:  # the engine also brings J^T w here, where nobody wants it
                s.register_post_accumulate_grad_hook(_forget)
        node.inputs, node.images = inputs, images
        # of its own memory: the user may write to it, and `inputs` are views of z
        states = list(_Implicit.apply(node, layout.outputs(z, fresh=True), *images))
    return states


def reads_more_than(images: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
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


class _Passage:
    """What a node tells the gate before its evaluation. It holds neither: graphs hold both, and no collector looks into those.

    recorded  whether a derivative through the node has been recorded, to be differentiated in turn
    pending   of backwards at work, by their numbers in the engine: the J^T w that comes to the gate beside what has to go
              through; None: nothing has to
    marked    the backwards at work that differentiate a recorded derivative; None: not known
    """

    def __init__(self, marks: bool) -> None:
        self.recorded = False
        self.pending: dict[int, list[Tensor] | None] = {}
        self.marked: set[int] | None = set() if marks else None

    def note(self, products: list[Tensor] | None) -> None:
        while len(self.pending) >= MOST_PENDING:  # of backwards that went through the node and not through the gate
            self.pending.pop(next(iter(self.pending)), None)
        self.pending[graph_task()] = products

    def alone(self, task: int) -> bool:
        """Whether nothing but J^T w can have come to the gate in this backward."""
        if self.marked is None:
            return False
        alone = task not in self.marked
        self.marked.discard(task)
        return alone


class _Node(Linearised):
    """One attached evaluation of f: its products by autograd, and what its backward needs. The gradients of what f reads come
    from this evaluation itself, so that w stands for them where they are measured.

    inputs, images  of the evaluation
    passage   what the gate in front of it is told
    """

    inputs: list[Tensor]
    images: list[Tensor]

    def __init__(self, known: Attachment, f: Body, level: int) -> None:
        self.known, self.f, self.level = known, f, level
        self.passage = _Passage(marks=level == 2)  # above, what is recorded of what is recorded need not come by the mark

    def products(self, w: Sequence[Tensor], **how: bool) -> list[Tensor]:
        """J^T w, for each of the state tensors."""
        pairs = [(image, c.to(image.dtype)) for image, c in zip(self.images, w, strict=True) if image.requires_grad]
        images, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(images, self.inputs, cotangents, retain_graph=True, allow_unused=True, **how)
        return [torch.zeros_like(z) if g is None else g for g, z in zip(found, self.inputs, strict=True)]

    def vjp(self, w: Tensor) -> Tensor:
        layout = self.known.layout
        return layout.flatten(self.products(layout.unflatten(w)))

    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        return self.vjp(w), [w]

    def adjoint_of(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """What goes on to the attached evaluation of f, for the cotangents of the fixed point."""
        layout, site = self.known.layout, self.known.site
        given = [torch.zeros_like(z) if c is None else c for c, z in zip(cotangents, self.inputs, strict=True)]
        known, inside = self.known, graphs.capturing()
        call = AdjointCall(site, known.factors, inside=inside, recycled=known.recycled, warm=known.warm, settled=known.settled)
        w = adjoint(BACKWARDS[site.spec.config.backward], self, layout.flatten(given), call, known.serial).w
        return layout.unflatten(w)

    def recorded_adjoint(self, w: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """The adjoint w as the fixed point that it is, so that autograd goes on to the cotangents and to what J depends on."""
        q = [torch.zeros_like(z) if c is None else c for c, z in zip(cotangents, self.inputs, strict=True)]

        def equation(w: list[Tensor]) -> list[Tensor]:
            return [c + g for c, g in zip(q, self.products(w, create_graph=True), strict=True)]

        layout, site = self.known.layout, self.known.site
        twin = _twins.get(site)
        if twin is None:
            twin = _twins[site] = Site(f"{site.key}-adjoint", site.spec)
        return attach(equation, layout.flatten(w), Attachment(twin, layout, derivatives=self.known.derivatives), self.level - 1)


class _Implicit(torch.autograd.Function):
    """The fixed point; its cotangent q goes on as w to one attached evaluation of f."""

    @staticmethod
    def forward(ctx: Any, node: _Node, states: list[Tensor], *images: Tensor) -> tuple[Tensor, ...]:
        ctx.node = node
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        node: _Node = ctx.node
        if all(c is None for c in cotangents):
            return (None, None, *([None] * len(cotangents)))
        with torch.no_grad(), graphs.made_current(node.inputs[0].device):
            batched = is_batched(cotangents)
            found = for_each_of_batch(node.adjoint_of, cotangents) if batched else node.adjoint_of(cotangents)
        records = torch.is_grad_enabled()
        if records and node.level > 1 and not batched:
            found = node.recorded_adjoint(found, cotangents)
            found = list(_Mark.apply(node.passage, len(found), *found, *node.inputs))
        elif records:
            more = f"derivatives={node.known.derivatives + 1} in the call of fixed_point, or the loop itself in eager mode"
            found = once(found, (*node.images, *cotangents), more)
        if node.level > 1:
            passage = node.passage
            passage.note(node.products(found, create_graph=records) if passage.recorded else None)
            passage.recorded = passage.recorded or records
        return (None, None, *(g.to(image.dtype) for g, image in zip(found, node.images, strict=True)))


class _Mark(torch.autograd.Function):
    """The adjoint of a recorded derivative, in which that is linear: who differentiates it comes by here, and, since the gate's
    outputs are inputs here, before he comes to the gate."""

    @staticmethod
    def forward(ctx: Any, passage: _Passage, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.passage, ctx.others = passage, len(tensors) - count
        ctx.set_materialize_grads(False)
        return tuple(w.view_as(w) for w in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if ctx.passage.marked is not None:
            ctx.passage.marked.add(graph_task())
        return (None, None, *cotangents, *(None for _ in range(ctx.others)))


class _Gate(torch.autograd.Function):
    """Between a fixed point and the next evaluation at it: lets through what derivatives of derivatives depend on."""

    @staticmethod
    def forward(ctx: Any, passage: _Passage, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.passage = passage
        ctx.set_materialize_grads(False)
        return tuple(s.view_as(s) for s in states)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        pending: dict[int, list[Tensor] | None] = ctx.passage.pending
        task = graph_task()
        if task not in pending:  # the evaluation is no part of this derivative: all of it is to pass
            return None, *given
        own, alone = pending.pop(task), ctx.passage.alone(task)
        if own is None or alone:
            return None, *(None for _ in given)
        return None, *(None if g is None else g - known for g, known in zip(given, own, strict=True))
