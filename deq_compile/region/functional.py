"""A fixed point inside of torch.func transforms, in any order and depth.

What f reads becomes explicit (`reads.Pure`): z* = F(z*, e). The fixed point is then an autograd Function of e whose rules are
fixed points in turn, so that every transform finds a rule at every depth:

    reverse   w = q + J^T w at z*, and w's product with the derivative of F by e
    forward   dz = dF + J dz
    vmap      the fixed point of vmap(F): the samples of vmap are the rows of one solve

Below all transforms stands the solve, on plain tensors, and the adjoint and the tangent as the compiler solves them elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import graphs
from .backward import BACKWARDS, AdjointCall, Settled
from .body import EagerLinearised, Runner
from .call import Call, Prepared
from .forward import solve
from .layout import Layout
from .modes import autograd_recording
from .reads import Pure
from .run import adjoint, run
from .site import Site
from .solvers import SOLVERS, Problem
from .status import converged
from .verdict import decide_rows, warn_of_tangent

States = Sequence[Tensor]
Map = Callable[[States, States], States]


class _Body(Runner):
    records = True

    def __init__(self, f: Callable[[States], States], layout: Layout) -> None:
        self.f, self.layout = f, layout

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return self.layout.flatten(self.f(self.layout.unflatten(z)))

    def evaluate_and_linearise(self, z: Tensor, operands: Any, needs: Any) -> Any:
        raise NotImplementedError("the implicit gradient takes its products from a derivative of f")


class _Products(EagerLinearised):
    """Of a body whose operands get their gradients elsewhere: w stands for those where they are measured."""

    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        return self.vjp(w), [w]


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """A fixed point to be found: of z -> F(z, operands).

    F      pure; states and operands -> states
    count  of states
    site   (z0's dtypes and dimensions, without those of vmap) -> the region
    lead   sizes of the dimensions that vmap has put in front of the states
    settled  by the first backward
    """

    F: Map
    count: int
    site: Callable[[States], Site]
    lead: tuple[int, ...] = ()
    settled: Settled = dataclasses.field(default_factory=Settled)

    def aligned(self, operands: int) -> int:
        """How many of the last operands have to be in the batch of vmap with the states."""
        return 0

    def solved(self, state0: States, operands: States) -> tuple[list[Tensor], Tensor]:
        """The states, and (lead…, rows, 3) what the solve came to."""
        starts, layout, site = self.rows(state0, operands)
        call = Call(site, starts, (), (), Prepared(layout.rows, layout, _Body(self.body(operands, layout), layout)))
        found = run(call)
        inner = state0[0].dim() - len(self.lead)
        rows = state0[0].shape[len(self.lead)] if inner else 1
        info = found.solve_info()
        if self.lead:
            info = info.unsqueeze(1).expand(-1, rows, -1).reshape(*self.lead, rows, info.shape[-1])
        return self.shaped(layout.outputs(found.z, fresh=True), state0), info.expand(*self.lead, rows, -1).clone()

    def rows(self, state0: States, operands: States) -> tuple[list[Tensor], Layout, Site]:
        """States with the samples of vmap as their rows, and how they lie."""
        at, n = len(self.lead), math.prod(self.lead)
        site = self.site([s.new_empty(s.shape[at:]) for s in state0] if at else state0)
        starts = [s.reshape(n, *s.shape[at:]) for s in state0] if at else list(state0)
        shapes = [tuple(s.shape) for s in starts]
        if at:
            orders = tuple(tuple(range(s.dim())) for s in starts)
            return starts, Layout(tuple(shapes), tuple(s.dtype for s in starts), orders, True), site

        def probed(layout: Layout) -> Callable[[Tensor], Tensor]:
            runner = _Body(self.body(operands, layout), layout)
            return lambda z: runner.apply(z, ())

        return starts, site.spec.layout(shapes, rows=decide_rows(site, starts, probed)), site

    def body(self, operands: States, layout: Layout) -> Callable[[States], States]:
        """F on states as a solver sees them."""
        if not self.lead:
            return lambda states: self.F(states, operands)
        shapes = [(*self.lead, *shape[1:]) for shape in layout.shapes]

        def split(states: States) -> States:
            found = self.F([s.reshape(shape) for s, shape in zip(states, shapes, strict=True)], operands)
            return [s.reshape(own) for s, own in zip(found, layout.shapes, strict=True)]

        return split

    def shaped(self, states: States, like: States) -> list[Tensor]:
        return [s.reshape(t.shape) for s, t in zip(states, like, strict=True)]

    def over(self, size: int, dims: Sequence[int | None], randomness: str) -> Equation:
        """The same for a batch of `size`, states in dimension 0, operands in `dims`."""
        F = self.F

        def batched(states: States, operands: States) -> States:
            found: States = torch.func.vmap(
                lambda s, o: tuple(F(s, o)), in_dims=(0, tuple(dims)), randomness=randomness
            )(tuple(states), tuple(operands))  # fmt: skip
            return found

        return dataclasses.replace(self, F=batched, lead=(size, *self.lead))

    def adjoint(self) -> Equation:
        """w = q + J^T w: operands are those of F, z* and q."""
        F, count = self.F, self.count

        def equation(w: States, operands: States) -> States:
            own, z, q = operands[: -2 * count], operands[-2 * count : -count], operands[-count:]
            pull = torch.func.vjp(lambda *s: tuple(F(s, own)), *z)[1]
            return [c + g for c, g in zip(q, pull(tuple(w)), strict=True)]

        return Adjoint(equation, count, self.site, self.lead, of=self)

    def tangent(self, moved: Sequence[int]) -> Equation:
        """dz = dF + J dz: operands are those of F, z*, and the tangents of those that are `moved`."""
        F, count = self.F, self.count

        def equation(dz: States, operands: States) -> States:
            at = len(operands) - len(moved)
            own, z, tangents = operands[: at - count], operands[at - count : at], operands[at:]

            def along(states: States, some: States) -> tuple[Tensor, ...]:
                places = dict(zip(moved, some, strict=True))
                return tuple(F(states, [places.get(i, o) for i, o in enumerate(own)]))

            primal = (tuple(z), tuple(own[i] for i in moved))
            return list(torch.func.jvp(along, primal, (tuple(dz), tuple(tangents)))[1])

        return Tangent(equation, count, self.site, self.lead)


@dataclasses.dataclass(frozen=True, eq=False)
class Adjoint(Equation):
    """Of the equation `of`, by its backward mode. Starts are the cotangents."""

    of: Equation | None = None

    def aligned(self, operands: int) -> int:
        return 2 * self.count

    def solved(self, state0: States, operands: States) -> tuple[list[Tensor], Tensor]:
        assert self.of is not None
        count = self.count
        own, z = operands[: -2 * count], operands[-2 * count : -count]
        starts, layout, site = self.of.rows(z, own)
        mode = BACKWARDS[site.spec.config.backward]
        body, q = self.of.body(own, layout), layout.flatten([c.reshape(s.shape) for c, s in zip(state0, starts, strict=True)])
        with autograd_recording():
            point = layout.flatten(starts).detach().requires_grad_()
            image = layout.flatten(body(layout.unflatten(point)))
        linear = _Products(image, point, [])
        call = AdjointCall(site, inside=graphs.capturing(), settled=self.of.settled)
        found = adjoint(mode, linear, q, call, 0)
        return self.shaped(layout.outputs(found.w, fresh=True), state0), q.new_zeros(())

    def over(self, size: int, dims: Sequence[int | None], randomness: str) -> Equation:
        assert self.of is not None
        batched = super().over(size, dims, randomness)
        own = dims[: -2 * self.count]
        return dataclasses.replace(batched, of=self.of.over(size, own, randomness))  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True, eq=False)
class Tangent(Equation):
    """Linear; solved to the tolerance of the adjoint."""

    def solved(self, state0: States, operands: States) -> tuple[list[Tensor], Tensor]:
        starts, layout, site = self.rows(state0, operands)
        runner, config = _Body(self.body(operands, layout), layout), site.spec.config
        most = max(config.max_iter, config.backward_max_iter)
        problem = Problem(tol=site.backward_tol, max_iter=most, body_eps=site.spec.body_eps)
        with torch.no_grad():
            found = solve(lambda dz: runner.apply(dz, ()), layout.flatten(starts), problem, solver=SOLVERS[config.solver])
        warn_of_tangent(site, bool(converged(found.status).all()), float(found.residual.max()))
        return self.shaped(layout.outputs(found.z, fresh=True), state0), starts[0].new_zeros(())


class Implicit(torch.autograd.Function):
    """The fixed point of an equation, by its operands: (equation, *states, *operands) -> (*states, what the solve came to)."""

    @staticmethod
    def forward(equation: Equation, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = equation.count
        with torch.no_grad(), graphs.made_current(tensors[0].device):
            states, info = equation.solved(tensors[:count], tensors[count:])
        return (*states, info)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.equation = equation = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        kept = (*output[: equation.count], *inputs[1 + equation.count :])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        equation: Equation = ctx.equation
        count = equation.count
        z, operands = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs = ctx.needs_input_grad[1 + count :]
        nothing = (None,) * (1 + count)
        if all(c is None for c in cotangents[:count]) or not any(needs):
            return (*nothing, *(None for _ in operands))
        q = [torch.zeros_like(s) if c is None else c for s, c in zip(z, cotangents[:count], strict=True)]
        w = Implicit.apply(equation.adjoint(), *q, *operands, *z, *q)[:count]
        chosen = [i for i, need in enumerate(needs) if need]

        def image(*some: Tensor) -> tuple[Tensor, ...]:
            places = dict(zip(chosen, some, strict=True))
            return tuple(equation.F(z, [places.get(i, o) for i, o in enumerate(operands)]))

        pull = torch.func.vjp(image, *(operands[i] for i in chosen))[1]
        found = dict(zip(chosen, pull(tuple(w)), strict=True))
        return (*nothing, *(found.get(i) for i in range(len(operands))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        equation: Equation = ctx.equation
        count = equation.count
        z, operands = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        moved = [i for i, t in enumerate(tangents[1 + count :]) if t is not None]
        if not moved:
            return (*(torch.zeros_like(s) for s in z), None)
        along = [tangents[1 + count + i] for i in moved]
        start = [torch.zeros_like(s) for s in z]
        found = Implicit.apply(equation.tangent(moved), *start, *operands, *z, *along)
        return (*found[:count], None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], equation: Equation, *tensors: Tensor) -> Any:
        size, count = info.batch_size, equation.count
        aligned = {*range(count), *range(len(tensors) - equation.aligned(len(tensors) - count), len(tensors))}
        moved, dims = [], []
        for i, (tensor, d) in enumerate(zip(tensors, in_dims[1:], strict=True)):
            together = d is not None or i in aligned
            moved.append(tensor if not together else tensor.expand(size, *tensor.shape) if d is None else tensor.movedim(d, 0))
            dims.append(0 if together else None)
        found = Implicit.apply(equation.over(size, dims[count:], info.randomness), *moved)
        return found, (0,) * count + ((0,) if found[-1].dim() else (None,))


def solve_in_transform(
    f: Callable[[list[Tensor]], States], state0: States, site: Callable[[States], Site]
) -> tuple[list[Tensor], Tensor]:
    """The fixed point of `f` from `state0` inside of torch.func transforms, and (rows, 3) what its solve came to.

    Args:
        f: list of state tensors -> tensors of the same shapes; of torch's own functions alone.
        site: (states without the dimensions of vmap) -> their region.

    Raises:
        NotHere: an f that reads other tensors at a later call, or is no composition of torch's functions.
    """
    pure = Pure(f, state0)
    *states, info = Implicit.apply(Equation(pure, len(state0), site), *state0, *pure.operands)
    return states, info
