"""Loops under a progress bar."""

from __future__ import annotations

import torch
import tqdm.auto
from torch import Tensor, nn
from tqdm import tqdm as bar
from tqdm import trange

from .observations import CAP, TOL, Told


class BarAroundARange(Told):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in bar(range(CAP), desc="solving", disable=True):
            z = self.f(z, x)
        return z


class BarOfACount(Told):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in trange(2, CAP + 2, leave=False, disable=True):
            z = self.f(z, x)
        return z


class BarAndATest(Told):
    def forward(self, x: Tensor) -> Tensor:
        z, k = torch.zeros_like(x), 0
        for k in tqdm.auto.tqdm(range(CAP), disable=True):  # noqa: B007
            new = self.f(z, x)
            gap = ((new - z).norm() / new.norm()).item()
            z = new
            if gap < TOL:
                break
        self.depth = k + 1
        return z


class BarOverLayers(Told):
    """No fixed point: the bar stays the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for i in bar(range(8), desc="layers"):
            x = torch.tanh(self.layers[i](x))
        return x


class BarWithAName(Told):
    """Somebody may speak to the bar."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        shown = bar(range(CAP), disable=True)
        for _ in shown:
            z = self.f(z, x)
        shown.close()
        return z


class BarByHand(Told):
    """As in a splitting library: a total, and an update in each iteration."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        shown = bar(total=CAP, disable=True)
        for _ in range(CAP):
            new = self.f(z, x)
            done = (new - z).norm() < TOL
            z = new
            shown.update()
            if done:
                break
        shown.close()
        return z


SHOW_NOTHING, STAY = (BarAroundARange, BarOfACount, BarAndATest), (BarOverLayers, BarWithAName, BarByHand)
