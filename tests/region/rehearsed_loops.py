"""Loops for CUDA engines that are rehearsed on the CPU, in Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Loop(nn.Module):
    def __init__(self, width: int = 17) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.orthogonal_(self.W.weight, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(12):
            z = torch.tanh(self.W(z) + self.U(x))
        return z


class ScaledLoop(Loop):
    """The same with a number that may be on another device than the state."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(width)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(12):
            z = torch.tanh(scale * self.W(z) + self.U(x))
        return z
