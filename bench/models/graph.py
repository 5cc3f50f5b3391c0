"""An implicit graph net (Gu et al., arXiv 2009.06211): Z = tanh(W Z A + b(U)). The nodes are one coupled system, no batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import scale_weights


class ImplicitGraph(nn.Module):
    """Node classification. features: (nodes, inputs), edges: (2, E) int64 (source, target). Returns (nodes, classes)."""

    def __init__(self, inputs: int = 6, hidden: int = 12, classes: int = 3, iterations: int = 50) -> None:
        super().__init__()
        self.iterations = iterations
        self.encode, self.decode = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
        self.W = nn.Linear(hidden, hidden, bias=False)
        scale_weights(self.W, 0.7)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        nodes = features.shape[0]
        degree = torch.zeros(nodes, dtype=features.dtype, device=features.device)
        degree = degree.index_add(0, target, torch.ones_like(target, dtype=features.dtype)).clamp_min(1)
        weight = (degree[source] * degree[target]).rsqrt()[:, None]
        b = self.encode(features)
        z = torch.zeros_like(b)
        for _ in range(self.iterations):
            messages = self.W(z)[source] * weight
            gathered = torch.zeros_like(z).index_add_(0, target, messages)
            z = torch.tanh(gathered + b)
        return self.decode(z)


def make() -> tuple[ImplicitGraph, tuple[Tensor, ...]]:
    """Twelve nodes on a ring with chords, both directions."""
    torch.manual_seed(0)
    nodes = torch.arange(12)
    edges = torch.cat([torch.stack([nodes, (nodes + step) % 12]) for step in (1, 5)], 1)
    edges = torch.cat([edges, edges.flip(0)], 1)
    return ImplicitGraph(), (torch.randn(12, 6), edges)
