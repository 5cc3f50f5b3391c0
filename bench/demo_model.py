"""The demo's model and data: a weight-tied classifier, written as one would without knowing of this package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.utils.parametrizations import spectral_norm


class WeightTiedClassifier(nn.Module):
    """z ← tanh(0.9 · W z + b + U x), ``n_iter`` times from zero, with |W|₂ = 1; then a linear head. [B, 64] -> [B, 10]

    The spectral norm makes the layer a contraction, so that the loop has a fixed point to run into. Its power iteration
    moves a buffer whenever the weight is read in training, so the weight is read once, before the loop.
    """

    def __init__(self, pixels: int = 64, width: int = 1024, classes: int = 10, n_iter: int = 40) -> None:
        super().__init__()
        self.n_iter = n_iter
        self.inject = nn.Linear(pixels, width)
        self.state = nn.Linear(width, width)
        spectral_norm(self.state)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 0.9 * self.state.weight
        z = x.new_zeros(x.shape[0], weight.shape[0])
        for _ in range(self.n_iter):
            z = torch.tanh(F.linear(z, weight, self.state.bias) + self.inject(x))
        logits: torch.Tensor = self.head(z)
        return logits


@dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels in [0, 1], shuffled once and split 1,437 / 360."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def digits() -> Digits:
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Digits(x[train], y[train], x[test], y[test])


def batches(n: int, batch: int, steps: int) -> list[torch.Tensor]:
    """The indices of ``steps`` full batches, epoch after epoch in a new order each; the same list in every process."""
    generator = torch.Generator().manual_seed(1)
    found: list[torch.Tensor] = []
    while len(found) < steps:
        found += [part for part in torch.randperm(n, generator=generator).split(batch) if len(part) == batch]
    return found[:steps]
