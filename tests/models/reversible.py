"""Problems of the reversible iteration, and its steps as the paper writes them (arXiv 2509.12917)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deq_compile import fixed_point

D, B = 8, 4


def pairs(f: Callable[[Tensor], Tensor], z0: Tensor, count: int, b: float = 0.8) -> Tensor:
    """z_N as the paper writes it."""
    y = z = z0
    for _ in range(count):
        y = (1 - b) * y + b * f(z)
        z = (1 - b) * z + b * f(y)
    return z


def leaky(gain: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight that turns by `gain`, an input, a start, a cotangent. A leaky layer forgives no drift, as a saturated one does."""
    torch.manual_seed(0)
    W = gain * torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    x, z0, q = (torch.randn(B, D, dtype=torch.float64) for _ in range(3))
    return W.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(), z0.to(dtype).requires_grad_(), q.to(dtype)


def layer(W: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: nn.functional.leaky_relu(z @ W.T + x, 0.5)


def steps(f: Callable[[Tensor], Tensor], z0: Tensor, evaluations: int, **options: Any) -> Tensor:
    """So many evaluations, whatever the residual."""
    return fixed_point(f, z0, solver="reversible", tol=1e-30, max_iter=evaluations, batch="whole", **options)


def gradients(z: Tensor, q: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad((z * q).sum(), inputs)]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


class Model(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W, self.call = nn.Linear(D, D), call
        nn.init.orthogonal_(self.W.weight, gain=0.6)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + x)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        if self.call == "fixed_point":
            return fixed_point(lambda z: self.f(z, x), z)
        for _ in range(60):
            before, z = z, self.f(z, x)
            if self.call == "until close" and (z - before).norm() < 1e-7 * z.norm():
                break
        return z


def in_turn(model: Model, x: Tensor, made: int) -> Tensor:
    """The paper's states in the order in which they are made."""
    before = now = torch.zeros_like(x)
    for _ in range(made):
        before, now = now, 0.2 * before + 0.8 * model.f(now, x)
    return now


class Product(torch.autograd.Function):
    """z W^T, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(z, W)
        return z @ W.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        z, W = ctx.saved_tensors
        return g @ W, g.T @ z
