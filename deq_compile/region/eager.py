"""A declared fixed point in plain eager mode: the solver and the adjoint of the compiled path, autograd for the products.

The fixed point is evaluated once more with gradients recorded, and its result handed on through a node whose backward
replaces the cotangent q by the adjoint w = q + J^T w. Whatever f reads, closures included, thereby gets its implicit gradient.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deq_compile.config import Config
from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.device import on_gpu

from . import engine, records
from .adjoint import AdjointSolution, jacobian_free, phantom, solve_adjoint
from .body import BodySpec
from .call import solve_for
from .forward import or_plain
from .layout import Layout
from .modes import Ambient
from .op import once
from .probe import rows_are_independent
from .run import record_forward
from .site import RegionSpec, Site
from .status import converged
from .surroundings import for_each_of_batch, is_batched
from .verdict import count_misses, warn_of_gradient
from .worth import factors_pay

Body = Callable[[list[Tensor]], Sequence[Tensor]]

# Sites of one function that are remembered: options may change from call to call, as an annealed tolerance does.
MOST_SITES = 64
_sites: weakref.WeakKeyDictionary[Any, dict[Any, Site]] = weakref.WeakKeyDictionary()


def solve_eagerly(f: Body, state0: Sequence[Tensor], config: Config, *, key: Any, where: str) -> list[Tensor]:
    """The fixed point of `f` from `state0`, attached to the autograd graph of what f reads.

    Args:
        f: list of state tensors -> tensors of the same shapes.
        state0: real floating-point tensors; left as they are.
        config: settled options.
        key: what stands for f from call to call (its code object); facts learnt about it are kept under that.
        where: the user's file and line.
    """
    if config.backward == "unroll":
        raise ValueError(
            f"fixed point at {where}: backward='unroll' is the gradient of the user's own loop, and a declared fixed point has "
            "none. Fix: backward='exact'"
        )
    site = _site(key, state0, config, where)
    layout = _layout(site, f, state0)

    z0 = layout.flatten(state0).detach()
    here = engine.current_device(z0.device)

    def flat(z: Tensor) -> Tensor:
        with torch.no_grad(), engine.made_current(here):  # the user's code runs as it would without a solver around it
            return layout.flatten(f(layout.unflatten(z)))

    with engine.made_current(z0.device):
        solution = solve_for(site, flat, z0)
        if not bool(converged(solution.status).all()):
            relative = config.stop_mode == "rel"
            solution = or_plain(solution, flat, z0, cap=config.max_iter, tol=site.tol, relative=relative)
    count_misses(site, solution)
    factors = solution.state.alone() if solution.state is not None and site.spec.stores_steps else None
    serial = record_forward(site, solution, solution.z, solution.evaluations, factors)
    if not torch.is_grad_enabled():
        return layout.outputs(solution.z)
    starts = [s.detach().requires_grad_() for s in layout.unflatten(solution.z)]
    inputs = [s.view_as(s) for s in starts]  # no leaves: hooks of modules do not expect those under `autograd.grad`
    images = list(f(inputs))
    if not _reads_more_than(images, starts):
        return layout.outputs(solution.z)
    for z in starts:  # the engine also brings J^T w here, where nobody wants it
        z.register_post_accumulate_grad_hook(_forget)
    adjoint = _Adjoint(layout, inputs, images, factors, config, site, serial)
    # of its own memory: the user may write to it, and `inputs` are views of z
    states = layout.outputs(solution.z, fresh=True)
    return list(_Implicit.apply(adjoint, states, *images))


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


def _layout(site: Site, f: Body, state0: Sequence[Tensor]) -> Layout:
    shapes = [s.shape for s in state0]
    batched = all(s.dim() for s in state0) and len({s.shape[0] for s in state0}) == 1
    if site.rows and not batched:
        raise ValueError(
            f"fixed point at {site.spec.where}: expected state tensors with one batch size in dimension 0 for batch='rows', got "
            f"shapes {[tuple(s) for s in shapes]}. Fix: batch='whole' or batch='auto'"
        )
    if not batched:
        return site.spec.layout(shapes, rows=False)
    layout = site.spec.layout(shapes, rows=site.rows is not False)
    if site.rows is None and shapes[0][0] >= 2:

        def body(z: Tensor) -> Tensor:
            with torch.no_grad():
                return layout.flatten(f(layout.unflatten(z)))

        site.rows = rows_are_independent(body, layout.flatten(state0).detach(), site.spec.body_eps)
    return site.spec.layout(shapes, rows=site.rows is not False)


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


class _Adjoint:
    """What the backward of one fixed point needs."""

    def __init__(
        self,
        layout: Layout,
        inputs: list[Tensor],
        images: list[Tensor],
        factors: Factors | None,
        config: Config,
        site: Site,
        serial: int,
    ) -> None:
        self.layout, self.inputs, self.images, self.factors = layout, inputs, images, factors
        self.config, self.site, self.serial = config, site, serial

    def of(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """What goes on to the attached evaluation of f, for the cotangents of the fixed point."""
        given = [torch.zeros_like(z) if c is None else c for c, z in zip(cotangents, self.inputs, strict=True)]
        w = self.solve(self.layout.flatten(given))
        return [g.to(image.dtype) for g, image in zip(self.layout.unflatten(w), self.images, strict=True)]

    def solve(self, q: Tensor) -> Tensor:
        config = self.config
        if config.backward == "jfb":
            if not self.serial:
                return q  # only a record wants its residual
            found = jacobian_free(self._certified, q)
        elif config.backward in ("phantom", "neumann"):
            damping = config.backward_damping if config.backward == "phantom" else 1.0
            found = phantom(self.vjp, self._certified, q, config.backward_steps, damping)
        else:
            found = self._refined(q)
            self.site.expected_vjps = found.needed
            warn_of_gradient(self.site, found)
        if self.serial:
            records.complete_adjoint(self.serial, q, found)
        return found.w

    def _refined(self, q: Tensor) -> AdjointSolution:
        config, site = self.config, self.site
        tol, max_iter, eps = config.backward_tol, max(1, config.backward_max_iter), site.spec.body_eps
        skip = 2 if config.memory < config.max_iter else 0  # a restart may have left two pairs that are not exact

        def attempt(factors: Factors | None) -> AdjointSolution:
            return solve_adjoint(
                self.vjp, self._certified, q, factors, tol=tol, max_iter=max_iter, expected=site.expected_vjps, body_eps=eps,
                skip=skip, estimate=bool(self.serial) and not on_gpu(q.device),
            )  # fmt: skip

        asks = self.factors is not None and not math.isinf(tol) and not on_gpu(q.device)
        due = asks and site.reuse_due()
        factors = None if asks and not (due or site.reuses) else self.factors
        site.backwards += 1
        found = attempt(factors)
        if due and factors is not None and q.numel():
            site.reuse(factors_pay(self.vjp, q, factors, found, tol=tol, max_iter=max_iter, body_eps=eps))
            if not site.reuses:  # this very call's gradient is that of the calls after it
                found = attempt(None)
        return found

    def _certified(self, w: Tensor) -> tuple[Tensor, None]:
        return self.vjp(w), None  # the operands' gradients come from the attached evaluation of f

    def vjp(self, w: Tensor) -> Tensor:
        """w (B, D) -> J^T w (B, D)."""
        cotangents = [
            c.to(image.dtype) for c, image in zip(self.layout.unflatten(w), self.images, strict=True) if image.requires_grad
        ]
        images = [image for image in self.images if image.requires_grad]
        grads = torch.autograd.grad(images, self.inputs, cotangents, retain_graph=True, allow_unused=True)
        return self.layout.flatten([torch.zeros_like(z) if g is None else g for g, z in zip(grads, self.inputs, strict=True)])


class _Implicit(torch.autograd.Function):
    """The fixed point; its cotangent q goes on as w to one attached evaluation of f."""

    @staticmethod
    def forward(ctx: Any, adjoint: _Adjoint, states: list[Tensor], *images: Tensor) -> tuple[Tensor, ...]:
        ctx.adjoint = adjoint
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        adjoint: _Adjoint = ctx.adjoint
        if all(c is None for c in cotangents):
            return (None, None, *([None] * len(cotangents)))
        with torch.no_grad(), engine.made_current(adjoint.inputs[0].device):
            found = for_each_of_batch(adjoint.of, cotangents) if is_batched(cotangents) else adjoint.of(cotangents)
        if torch.is_grad_enabled():
            found = once(found, (*adjoint.images, *cotangents))
        return (None, None, *found)
