"""Implicit gradients as libraries attach them: by an autograd Function, or by a hook, around a solve without gradients."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

Map = Any


def picard(f: Map, z0: Tensor, max_iter: int = 80, tol: float = 1e-6) -> tuple[Tensor, dict[str, Any]]:
    """A dictionary whose names nobody knows."""
    z, k, gap, done = z0, 0, 1.0, False
    for k in range(max_iter):  # noqa: B007
        new = f(z)
        gap = ((new - z).norm() / new.norm()).item()
        z = new
        if gap < tol:
            done = True
            break
    return z, {"rounds": k + 1, "gap": gap, "success": done, "scheme": "picard", "history": None}


class Attach(torch.autograd.Function):
    """z, with the gradient w = q + J^T w, or so many terms of its series; the parameters are inputs, the graph comes aside."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, graph: dict[str, Any], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.graph, ctx.inputs = graph, (x, *parameters)
        return z

    @staticmethod
    def backward(ctx: Any, q: Tensor) -> Any:
        start, image, terms, clip = ctx.graph["start"], ctx.graph["image"], ctx.graph["terms"], ctx.graph["clip"]
        w = q
        for _ in range(terms - 1 if terms else 80):
            product = torch.autograd.grad(image, start, w, retain_graph=True)[0]
            if clip is not None:
                product = product * (clip * q.norm() / product.norm()).clamp(max=1.0)
            w, before = q + product, w
            if not terms and (w - before).norm() < 1e-6 * w.norm():
                break
        wanted = [t for t in ctx.inputs if t.requires_grad]
        grads = iter(torch.autograd.grad(image, wanted, w))
        return (None, None, *(next(grads) if t.requires_grad else None for t in ctx.inputs))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(16, 16), nn.Linear(16, 16)
        nn.init.orthogonal_(self.W.weight, gain=0.7)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.U(x))


class WithFunction(nn.Module):
    terms, given = 0, 4
    clip: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.f = Body()
        self.info: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, self.info = picard(lambda z: self.f(z, x.detach()), torch.zeros_like(x))
        start = z.detach().requires_grad_()
        graph = {"start": start, "image": self.f(start, x), "terms": self.terms, "clip": self.clip}
        out: Tensor = Attach.apply(z, graph, x, *list(self.f.parameters())[: self.given])
        return out


class ThreeTerms(WithFunction):
    terms = 3


class OneTerm(WithFunction):
    """The cotangent as it is: Jacobian-free."""

    terms = 1


class Clipped(WithFunction):
    terms, clip = 3, 1.0


class SomeParametersOnly(WithFunction):
    """The rest of the parameters would get a gradient that the function does not give them."""

    given = 2


class OtherReturned(WithFunction):
    """The function's result is no fixed point, its gradient that of one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, self.info = picard(lambda z: self.f(z, x.detach()), torch.zeros_like(x))
        start = z.detach().requires_grad_()
        graph = {"start": start, "image": self.f(start, x), "terms": self.terms, "clip": self.clip}
        out: Tensor = Attach.apply(self.other(z, x), graph, x, *self.f.parameters())
        return out

    def other(self, z: Tensor, x: Tensor) -> Tensor:
        return 3 * z


class SumReturned(OtherReturned):
    def other(self, z: Tensor, x: Tensor) -> Tensor:
        return z + x.detach()


class InputReturned(OtherReturned):
    def other(self, z: Tensor, x: Tensor) -> Tensor:
        return x.detach()


class CopyReturned(OtherReturned):
    """The fixed point itself, by another name."""

    def other(self, z: Tensor, x: Tensor) -> Tensor:
        return z.clone().detach()


class WithHook(nn.Module):
    """A solver that is an attribute, called in the hook with arguments from a dictionary, and `requires_grad_(True)`."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.solver, self.settings, self.handle = Body(), picard, {"b_tol": 1e-6, "b_max_iter": 70}, None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, _ = self.solver(lambda z: self.f(z, x), torch.zeros_like(x))
        z = self.f(z, x)
        start = z.detach().clone().requires_grad_(True)
        image = self.f(start, x)

        def hook(q: Tensor) -> Tensor:
            settings = {name[2:]: value for name, value in self.settings.items()}
            out, _ = self.solver(
                lambda w: torch.autograd.grad(image, start, w, retain_graph=True)[0] + q, torch.zeros_like(q), **settings
            )
            return out

        if z.requires_grad:
            z.register_hook(hook)
        return z


class HookWithTerms(WithHook):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, _ = picard(lambda z: self.f(z, x), torch.zeros_like(x))
        z = self.f(z, x)
        start = z.detach().requires_grad_()
        image = self.f(start, x)
        z.register_hook(lambda q: q + torch.autograd.grad(image, start, q, retain_graph=True)[0])
        return z


class TalkativeHook(WithHook):
    """A hook that notes, prints and draws: a trial of it must not be noticed."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.log, self.calls = [0], {"count": [0]}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, _ = picard(lambda z: self.f(z, x), torch.zeros_like(x))
        z = self.f(z, x)
        start = z.detach().clone().requires_grad_()
        image = self.f(start, x)

        def hook(q: Tensor) -> Tensor:
            product = torch.autograd.grad(image, start, q, retain_graph=True)[0]
            self.log.append(1)
            self.calls["count"].append(1)
            self.seen += 1
            print("in the hook", torch.rand(()), random.random())
            return q + product

        z.register_hook(hook)
        return z


IMPLICIT, SERIES = (WithFunction, CopyReturned, WithHook), {ThreeTerms: 3, OneTerm: 1, HookWithTerms: 2}
LEFT_ALONE = {Clipped: "clips", SomeParametersOnly: "less than what f depends on"}
NO_FIXED_POINTS = (OtherReturned, SumReturned, InputReturned)
