"""What the small models of the tests are made of: bodies that contract, and a case with what is expected of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_compile import Reason

N = 60
D = 16


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    regions: int
    refused: Reason | None = None
    shape: tuple[int, ...] = (4, D)

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = self.build()
        contract(model)
        return model.to(dtype), torch.randn(self.shape, dtype=torch.float64).to(dtype)


def contract(module: nn.Module, norm: float = 0.5) -> None:
    """Scale every weight matrix to a spectral norm of `norm`."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() >= 2 and "parametrizations" not in name:
                p.mul_(norm / torch.linalg.matrix_norm(p.flatten(1), 2))


class Linear(nn.Module):
    """f(z, x) = tanh(W z + U x)"""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.U(x))


class LayerNormMLP(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.W1, self.W2, self.U, self.norm = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, d), nn.LayerNorm(d)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * self.norm(self.U(x) + self.W2(F.relu(self.W1(z))))


class ConvNorm(nn.Module):
    """Residual block with GroupNorm and in-place ReLU, as in multiscale DEQs."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.n1, self.n2, self.relu = nn.GroupNorm(4, c), nn.GroupNorm(4, c), nn.ReLU(inplace=True)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.relu(self.n1(self.c1(z)))
        y = self.c2(y)
        y += x
        return 0.3 * self.relu(self.n2(y))


class Block(nn.Module):
    """Transformer block with attention."""

    def __init__(self, d: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.h = heads
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.f1, self.f2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        B, T, d = z.shape
        q, k, v = (t.view(B, T, self.h, d // self.h).transpose(1, 2) for t in self.qkv(z + x).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v)
        y = self.o(a.transpose(1, 2).reshape(B, T, d)) + x
        return y + self.f2(torch.tanh(self.f1(y)))


class Loop(nn.Module):
    """The plain loop: z = f(z, x), N times."""

    def __init__(self, f: nn.Module, n: int = N) -> None:
        super().__init__()
        self.f, self.n = f, n

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.n):
            z = self.f(z, x)
        return z


class Parts(nn.Module):
    """Parts that the forms below share."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Linear(), Linear()
