"""The bound: as many evaluations and VJPs as the deq row used, called without guards, and no solver at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case
from .methods import Counts, NotApplicable, Step


class _Body(nn.Module):
    """The loop's body as a module's forward."""

    def __init__(self, loop: Any) -> None:
        super().__init__()
        self.loop = loop

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        found: Tensor = self.loop.body(z, u)
        return found


class Bound(Step):
    """k evaluations of z <- f(z) and v VJPs of w <- J^T w: no residual, no norm, no update.

    The last evaluation linearises, as the least that any implementation needs; where the product evaluates once more
    to linearise, `linearised` of its counts is 1 and so does the bound.
    """

    def __init__(self, case: Case, deq: Counts | None, inner: str = "inductor") -> None:
        from deq_compile.testing import Ambient, BodySpec, Layout, runner_for

        super().__init__(case)
        if deq is None:
            raise NotApplicable("no row of deq solves here, so there are no counts to take")
        assert case.loop is not None
        self.applies = deq["iterations_max"] + min(1, deq["linearised"]) - 1
        self.vjps = deq["vjps"]
        body, (x,) = _Body(case.loop), case.inputs
        self.z0 = torch.zeros_like(x, requires_grad=False)
        u = case.loop.injection(x.detach()).detach()
        named = dict(body.named_parameters())
        used = torch.autograd.grad(body(self.z0, u).sum(), list(named.values()), allow_unused=True)
        self.names = [name for name, gradient in zip(named, used, strict=True) if gradient is not None]
        self.parameters = [named[name] for name in self.names]

        def call(z: Tensor, u: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            found = torch.func.functional_call(body, dict(zip(self.names, parameters, strict=True)), (z, u))
            return (found,)

        order = tuple(range(x.dim()))
        self.images = any(isinstance(m, nn.Conv2d) for m in case.loop.modules())  # channels last, as in the product
        self.layout = Layout((tuple(x.shape),), (x.dtype,), (order,), rows=True, channels_last=self.images)
        spec = BodySpec(call, f"bench-{case.name}", Ambient.now(), inner)
        self.runner = runner_for(spec, self.layout, self.arranged([u, *(p.detach() for p in self.parameters)]), ())

    def arranged(self, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        from deq_compile.testing import channels_last

        return channels_last(operands) if self.images else operands

    def forward(self) -> Tensor:
        assert self.case.loop is not None
        u = self.case.loop.injection(self.case.inputs[0])
        found: Tensor = _Region.apply(self, self.z0, u, *self.parameters)
        return found

    def counts(self) -> Counts:
        return {"iterations": self.applies + 1, "vjps": self.vjps, "status": "bound"}


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bound: Bound, z0: Tensor, *operands: Tensor) -> Tensor:
        z, own = bound.layout.flatten([z0]), bound.arranged(operands)
        for _ in range(bound.applies):
            z = bound.runner.apply(z, own)
        ctx.linear = bound.runner.linearise(z, own, (True,) * len(own))
        ctx.bound = bound
        return bound.layout.outputs(z)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        w = ctx.bound.layout.flatten(list(grad_outputs))
        for _ in range(ctx.bound.vjps - 1):
            w = ctx.linear.vjp(w)
        _, gradients = ctx.linear.vjp_full(w)
        ctx.linear = None
        return None, None, *gradients
