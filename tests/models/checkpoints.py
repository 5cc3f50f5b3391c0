"""Loops whose body runs under torch.utils.checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .parts import Linear, N, Parts


class Checkpointed(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(N):
            z = checkpoint(self.f, z, x, use_reentrant=False)  # type: ignore[assignment]
        return z


class CheckpointedLayers(nn.Module):
    """One checkpoint a layer, each with its own weights: no loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for layer in self.layers:
            z = checkpoint(layer, z, x, use_reentrant=False)  # type: ignore[assignment]
        return z


class CheckpointedDropout(Parts):
    def noisy(self, z: Tensor, x: Tensor) -> Tensor:
        return F.dropout(self.f(z, x), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(10):
            z = checkpoint(self.noisy, z, x, use_reentrant=False)  # type: ignore[assignment]
        return z
