"""Bodies of the study, and the data they are trained on: a module is `f(z, x)` on a flat state z (B, D).

`TRAINED` are the bodies that the hyper-parameters of the adjoint were chosen on (with seed 0); `HELD_OUT` are those that had
no say. Training is in `train.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
TRAINING_SAMPLES = 1500


class MLP(nn.Module):
    """tanh(W z + U x)"""

    def __init__(self, width: int = 64, inputs: int = 64, radius: float = 0.7) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(width, width), nn.Linear(inputs, width)
        nn.init.normal_(self.W.weight, std=radius / width**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.U(x))


class LayerNormMLP(nn.Module):
    """LayerNorm(U x + W2 relu(W1 z)); the Jacobian's spectral radius may pass 1."""

    def __init__(self, width: int = 64, inputs: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.W1, self.W2, self.U = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.W2.weight, std=hidden**-0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.U(x) + self.W2(F.relu(self.W1(z))))


class WeightNormConv(nn.Module):
    """3x3 convolution whose kernel has norm at most 1 an output channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * 0.1)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), 0.5))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.direction.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, self.direction / norm * self.gain.clamp(-1, 1), self.bias, padding=1)


class ConvBlock(nn.Module):
    """The block of an MDEQ (arXiv 2006.08656): gn3(relu([z +] gn2(U x + c2 gn1 relu... c1 z)))."""

    def __init__(self, channels: int = 16, size: int = 8, residual: bool = True) -> None:
        super().__init__()
        self.shape, self.residual = (channels, size, size), residual
        self.c1, self.c2 = WeightNormConv(channels, channels), WeightNormConv(channels, channels)
        self.U = nn.Conv2d(1, channels, 3, padding=1)
        self.n1, self.n2, self.n3 = (nn.GroupNorm(4, channels) for _ in range(3))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z = z.view(-1, *self.shape)
        y = self.n2(self.c2(F.relu(self.n1(self.c1(z)))) + self.U(x))
        return self.n3(F.relu(y + z if self.residual else y)).flatten(1)


class TransformerBlock(nn.Module):
    """Post-norm block with the input injected into queries, keys and values, as in the DEQ-Transformer (arXiv 1909.01377)."""

    def __init__(self, length: int = 8, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.shape, self.heads = (length, width), heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.f1, self.f2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.l1, self.l2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        length, width = self.shape
        z = z.view(-1, length, width)
        q, k, v = (t.view(-1, length, self.heads, width // self.heads).transpose(1, 2) for t in (self.qkv(z) + x).chunk(3, -1))
        a = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // self.heads), -1) @ v
        z = self.l1(z + self.o(a.transpose(1, 2).reshape(-1, length, width)))
        return self.l2(z + self.f2(F.relu(self.f1(z)))).flatten(1)


class Gated(nn.Module):
    """(1 - u) z + u tanh(V (r z) + B x), gates from z and x: a GRU cell as a body, as in DEQ-Flow (arXiv 2204.08442)."""

    def __init__(self, width: int = 96, inputs: int = 64) -> None:
        super().__init__()
        self.gates, self.V = nn.Linear(width + inputs, 2 * width), nn.Linear(width, width)
        self.B = nn.Linear(inputs, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        u, r = torch.sigmoid(self.gates(torch.cat((z, x), 1))).chunk(2, 1)
        return (1 - u) * z + u * torch.tanh(self.V(r * z) + self.B(x))


class PreNormResidual(nn.Module):
    """0.5 z + W2 gelu(W1 LayerNorm(z) + U x): a residual branch before which the state is normalised."""

    def __init__(self, width: int = 160, inputs: int = 64) -> None:
        super().__init__()
        self.W1, self.W2, self.U = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(inputs, 2 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z + self.W2(F.gelu(self.W1(self.norm(z)) + self.U(x)))


@dataclass(frozen=True)
class Recipe:
    """How a body is made and trained; `regularise` weighs the Jacobian term of arXiv 2106.14342."""

    make: Callable[[], nn.Module]
    width: int
    inputs: Callable[[Tensor], Tensor]
    steps: int
    regularise: float = 0.0


def _flat(x: Tensor) -> Tensor:
    return x


def _image(x: Tensor) -> Tensor:
    return x.view(-1, 1, 8, 8) * 2 - 0.6


def _tokens(x: Tensor) -> Tensor:
    """Each row of the image as a token of 96 features, by a fixed random projection."""
    projection = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * 0.7
    return x.view(-1, 8, 8) @ projection.to(x.dtype)


TRAINED: dict[str, Recipe] = {
    "mlp": Recipe(MLP, 64, _flat, 400),
    "layernorm": Recipe(LayerNormMLP, 64, _flat, 400),
    "conv": Recipe(ConvBlock, 1024, _image, 300, 3.0),
    "conv-plain": Recipe(lambda: ConvBlock(residual=False), 1024, _image, 300, 0.1),
    "transformer": Recipe(TransformerBlock, 256, _tokens, 250, 0.3),
    "transformer-free": Recipe(TransformerBlock, 256, _tokens, 200),
}
HELD_OUT: dict[str, Recipe] = {
    "gru": Recipe(Gated, 96, _flat, 300),
    "prenorm": Recipe(PreNormResidual, 160, _flat, 300),
    "mlp-wide": Recipe(lambda: MLP(256, 64, 0.9), 256, _flat, 200),
}
RECIPES = TRAINED | HELD_OUT


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 64) intensities in [0, 1] and (1797,) labels of scikit-learn's digits, shuffled with a fixed seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
