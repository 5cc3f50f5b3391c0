"""A weight that f only gives to an autograd Function, a custom operator or a checkpoint: its derivative is right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import deq_compile
from deq_compile import fixed_point

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, by the first forward mode
D = 5
OPTIONS: dict[str, Any] = {"tol": 1e-12, "backward_tol": 1e-12, "max_iter": 60, "backward_max_iter": 60}
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = 0.4 * torch.linalg.qr(torch.randn(D, D, generator=GENERATOR, dtype=torch.float64)).Q
X = torch.randn(3, D, generator=GENERATOR, dtype=torch.float64)


class Product(torch.autograd.Function):
    """z W^T by its own rules."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, w: Tensor) -> Tensor:
        return z @ w.T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        z, w = ctx.saved_tensors
        return g @ w, g.mT @ z

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, dw: Tensor) -> Tensor:
        z, w = ctx.saved_tensors
        return dz @ w.T + z @ dw.T


class OldProduct(torch.autograd.Function):
    """The same with a forward that is given the context, which transforms do not take."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(z, w)
        return z @ w.T

    backward = Product.backward


@torch.library.custom_op("given_to_functions::product", mutates_args=())
def operator(z: Tensor, w: Tensor) -> Tensor:
    return z @ w.T


operator.register_fake(lambda z, w: z.new_empty(z.shape[0], w.shape[0]))
operator.register_autograd(Product.backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@operator.register_vmap
def batched(info: Any, dims: tuple[int | None, ...], z: Tensor, w: Tensor) -> tuple[Tensor, int]:
    z, w = (t if d is None else t.movedim(d, 0) for t, d in zip((z, w), dims, strict=True))
    return z @ w.mT, 0


class Module(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, z: Tensor) -> Any:
        return Product.apply(z, self.w)  # type: ignore[no-untyped-call]


Layer = Callable[[Tensor], Any]
LAYERS: dict[str, Callable[[Tensor], Layer]] = {
    "function": lambda w: lambda z: Product.apply(z, w),  # type: ignore[no-untyped-call]
    "old function": lambda w: lambda z: OldProduct.apply(z, w),  # type: ignore[no-untyped-call]
    "module": Module,
    "operator": lambda w: lambda z: operator(z, w),
    "checkpoint": lambda w: lambda z: checkpoint(lambda a: a @ w.T, z, use_reentrant=False),
    "vmap": lambda w: torch.func.vmap(lambda row: w @ row),
}
PLAIN = lambda w: lambda z: z @ w.T  # noqa: E731

Solve = Callable[..., Tensor]


def first(solve: Solve) -> Tensor:
    w = WEIGHT.clone().requires_grad_()
    return torch.autograd.grad(solve(w, X).sin().sum(), w)[0]


def second(solve: Solve) -> Tensor:
    w = WEIGHT.clone().requires_grad_()
    (g,) = torch.autograd.grad(solve(w, X, derivatives=2).sin().sum(), w, create_graph=True)
    return torch.autograd.grad(g.square().sum(), w)[0]


def tangent(solve: Solve) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(solve(forward_ad.make_dual(WEIGHT, torch.ones_like(WEIGHT)), X)).tangent
    return torch.zeros_like(X) if found is None else found


def outside_of_grad(solve: Solve) -> Tensor:
    """Autograd's own gradient of the weight, through a transform that is about something else."""
    w = WEIGHT.clone().requires_grad_()
    g = torch.func.grad(lambda x: solve(w, x).sin().sum())(X)
    return torch.autograd.grad(g.square().sum(), w)[0]


def outside_of_vmap(solve: Solve) -> Tensor:
    w = WEIGHT.clone().requires_grad_()
    return torch.autograd.grad(torch.func.vmap(lambda x: solve(w, x[None]))(X).sin().sum(), w)[0]


def by_func(solve: Solve) -> Tensor:
    return torch.func.grad(lambda w: solve(w, X).sin().sum())(WEIGHT)


def by_jacrev(solve: Solve) -> Any:
    return torch.func.jacrev(lambda w: solve(w, X).sum(0))(WEIGHT)


WAYS = [first, second, tangent, outside_of_grad, outside_of_vmap, by_func, by_jacrev]
RIGHT = {  # what is not refused, by torch or here; the least that has to work
    "function": {*WAYS},
    "old function": {first, second},
    "module": {*WAYS},
    "operator": {first, second, outside_of_vmap},
    "checkpoint": {first, second},
    "vmap": {first, second, tangent},
}


def solving(layer: Callable[[Tensor], Layer]) -> Solve:
    def solve(w: Tensor, x: Tensor, **options: Any) -> Tensor:
        f = layer(w)
        return fixed_point(lambda z: torch.tanh(f(z) + x), torch.zeros_like(x), **OPTIONS, **options)

    return solve


@pytest.mark.parametrize("way", WAYS)
def test_right_or_refused(way: Callable[[Solve], Tensor]) -> None:
    right = way(solving(PLAIN))
    assert right.norm() > 0.1
    for name, layer in LAYERS.items():
        deq_compile.reset()
        try:
            found = way(solving(layer))
        except (RuntimeError, NotImplementedError):
            assert way not in RIGHT[name], name
            continue
        torch.testing.assert_close(found, right, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]
