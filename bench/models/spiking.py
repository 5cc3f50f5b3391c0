"""An equilibrium spiking net (Xiao et al., arXiv 2109.14247): the forward is a simulation with thresholds.

Leaky integrate-and-fire neurons with feedback; the average firing rate tends to an equilibrium, slowly (as 1/T), and the
simulation itself has no fixed point: a compiler must leave its value alone, and its surrogate gradient too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .common import scale_weights


class Spike(torch.autograd.Function):
    """Heaviside step with a triangular surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grads[0] * (1 - u.abs()).clamp_min(0)


class SpikingNet(nn.Module):
    """x: (B, inputs). Returns class scores (B, classes) from the average firing rate of `steps` time steps."""

    def __init__(self, inputs: int = 8, hidden: int = 16, classes: int = 4, steps: int = 30, leak: float = 0.9) -> None:
        super().__init__()
        self.steps, self.leak, self.threshold = steps, leak, 1.0
        self.encode, self.feedback, self.decode = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, classes)
        scale_weights(self.feedback, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        current = self.encode(x)
        u = torch.zeros_like(current)
        spike = torch.zeros_like(current)
        rate = torch.zeros_like(current)
        for _ in range(self.steps):
            u = self.leak * u + self.feedback(spike) + current
            spike = Spike.apply(u - self.threshold)
            u = u - self.threshold * spike
            rate = rate + spike
        return self.decode(rate / self.steps)


def make() -> tuple[SpikingNet, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return SpikingNet(), (2 * torch.randn(4, 8),)
