"""The benchmark problems: models with a plain loop, ``z ← f(z, x)`` repeated a fixed number of times.

========== =============== ==================================================================================
name       state           body
========== =============== ==================================================================================
mlp128     128 x 128       tanh(W z + U x), |W|₂ = 0.95
mlp128sym  128 x 128       the same with W symmetric: eigenvalues up to 0.95, so the plain loop converges slowly
mlp1024    32 x 1024       tanh(W z + U x), |W|₂ = 0.95
mlp1024sym 32 x 1024       the same with W symmetric
conv       8 x 32 x 16 x 16 tanh(c₂(tanh(c₁ z)) + c₃ x), 3x3 convolutions, the norm of c₂∘c₁ about 0.95
transformer 4 x 64 x 256   attention and MLP of (z + U x), 4 heads, scaled so that it contracts
========== =============== ==================================================================================

Parameters, input and cotangent are drawn from seed 0 in float32, so every run times and checks the same numbers.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

LIPSCHITZ = 0.95


@torch.no_grad()
def scale_spectral_norm(weight: torch.Tensor, norm: float) -> None:
    """Scale ``weight`` [out, in] in place to the given spectral norm."""
    weight.mul_(norm / torch.linalg.matrix_norm(weight.double(), 2).to(weight.dtype))


class Loop(nn.Module, abc.ABC):
    """The loop around a body; ``inject`` says whether x enters inside the loop, as most write it, or before it."""

    def __init__(self, n_iter: int, inject: str) -> None:
        super().__init__()
        if inject not in ("inside", "before"):
            raise ValueError(f"inject: expected 'inside' or 'before', got {inject!r}")
        self.n_iter = n_iter
        self.inject_inside = inject == "inside"

    @abc.abstractmethod
    def injection(self, x: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def body(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(x)
        if self.inject_inside:
            for _ in range(self.n_iter):
                z = self.body(z, self.injection(x))
        else:
            u = self.injection(x)
            for _ in range(self.n_iter):
                z = self.body(z, u)
        return z


class MLP(Loop):
    """z ← tanh(W z + b + U x). [B, D]"""

    def __init__(self, width: int, n_iter: int, inject: str, symmetric: bool = False) -> None:
        super().__init__(n_iter, inject)
        self.W = nn.Linear(width, width)
        self.U = nn.Linear(width, width, bias=False)
        if symmetric:
            scale_spectral_norm(self.W.weight, LIPSCHITZ)
            with torch.no_grad():
                drawn = torch.randn(width, width)
                self.W.weight.copy_(drawn + drawn.T)
                self.U.weight.mul_(0.1)
        scale_spectral_norm(self.W.weight, LIPSCHITZ)

    def injection(self, x: torch.Tensor) -> torch.Tensor:
        return self.U(x)

    def body(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.W(z) + u)


class Conv(Loop):
    """z ← tanh(c₂(tanh(c₁ z)) + c₃ x). [B, C, H, H]"""

    def __init__(self, channels: int, size: int, n_iter: int, inject: str) -> None:
        super().__init__(n_iter, inject)
        self.c1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.c2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.c3 = nn.Conv2d(channels, channels, 3, padding=1)
        for conv in (self.c1, self.c2):
            self.scale(conv.weight, channels, size)

    @staticmethod
    @torch.no_grad()
    def scale(weight: torch.Tensor, channels: int, size: int) -> None:
        """Scale the kernel so that the convolution, as an operator on size x size images, has norm √0.95."""
        v = torch.randn(1, channels, size, size)
        norm_squared = torch.ones(())
        for _ in range(60):  # power iteration on AᵀA
            w = F.conv_transpose2d(F.conv2d(v, weight, padding=1), weight, padding=1)
            norm_squared = w.norm() / v.norm()
            v = w / w.norm()
        weight.mul_(math.sqrt(LIPSCHITZ) / norm_squared.sqrt())

    def injection(self, x: torch.Tensor) -> torch.Tensor:
        return self.c3(x)

    def body(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.c2(torch.tanh(self.c1(z))) + u)


class Transformer(Loop):
    """z ← attention(y) + MLP(y) with y = z + U x. [B, T, D]"""

    def __init__(self, width: int, heads: int, n_iter: int, inject: str) -> None:
        super().__init__(n_iter, inject)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)
        self.f1 = nn.Linear(width, 2 * width)
        self.f2 = nn.Linear(2 * width, width)
        self.U = nn.Linear(width, width)
        for layer, norm in ((self.qkv, 1.0), (self.o, LIPSCHITZ / 2), (self.f1, 1.0), (self.f2, LIPSCHITZ / 2)):
            scale_spectral_norm(layer.weight, norm)

    def injection(self, x: torch.Tensor) -> torch.Tensor:
        return self.U(x)

    def body(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        y = z + u
        batch, length, width = y.shape
        q, k, v = self.qkv(y).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // self.heads), -1) @ v
        return self.o(attention.transpose(1, 2).reshape(batch, length, width)) + self.f2(torch.tanh(self.f1(y)))


Make = Callable[[int, str], Loop]
PROBLEMS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "mlp128": (lambda n, inject: MLP(128, n, inject), (128, 128)),
    "mlp128sym": (lambda n, inject: MLP(128, n, inject, symmetric=True), (128, 128)),
    "mlp1024": (lambda n, inject: MLP(1024, n, inject), (32, 1024)),
    "mlp1024sym": (lambda n, inject: MLP(1024, n, inject, symmetric=True), (32, 1024)),
    "conv": (lambda n, inject: Conv(32, 16, n, inject), (8, 32, 16, 16)),
    "transformer": (lambda n, inject: Transformer(256, 4, n, inject), (4, 64, 256)),
}


def make(name: str, n_iter: int = 30, inject: str = "inside") -> tuple[Loop, torch.Tensor, torch.Tensor]:
    """The model, its input x and the cotangent c of the named problem, all float32; x requires a gradient.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem: expected one of {', '.join(PROBLEMS)}, got {name!r}")
    build, shape = PROBLEMS[name]
    torch.manual_seed(0)
    module = build(n_iter, inject)
    x = torch.randn(shape)
    c = torch.randn_like(x)
    return module, x.requires_grad_(), c


def loss(z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """(z · c) / B, so that the gradient at a sample does not depend on the size of the batch."""
    return (z * c).sum() / c.shape[0]
