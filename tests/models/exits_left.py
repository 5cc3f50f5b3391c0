"""Loops with a test that no solve may stand in for."""

from __future__ import annotations

import torch
from torch import Tensor

from .form import CAP, TOL, Cell, iterate
from .parts import Linear


class CounterReturned(Cell):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        z = torch.zeros_like(x)
        for k in range(CAP):  # noqa: B007
            z_new = self.f(z, x)
            res = (z_new - z).norm()
            z = z_new
            if res < TOL:
                break
        return z, k


class FlagReturned(Cell):
    def forward(self, x: Tensor) -> tuple[Tensor, bool]:
        z, converged = torch.zeros_like(x), False
        for _ in range(CAP):
            z_new = self.f(z, x)
            res = (z_new - z).norm()
            z = z_new
            if res < TOL:
                converged = True
                break
        return z, converged


class EarlyReturnSaysHow(Cell):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            if (z_new - z).norm() < TOL:
                return z_new, "converged"
            z = z_new
        return z, "gave up"


class AttributeWritten(Cell):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            z_new = self.f(z, x)
            res = (z_new - z).norm()
            z = z_new
            self.steps = k
            if res < TOL:
                break
        return z


class CountingCell(Linear):
    calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(z, x)


class CallsCounted(Cell):
    """The body counts its evaluations, as code for differential equations does."""

    def __init__(self) -> None:
        super().__init__()
        self.f = CountingCell()

    def forward(self, x: Tensor) -> Tensor:
        return iterate(lambda z: self.f(z, x), torch.zeros_like(x))


class StatisticsKept(Cell):
    """A dictionary that outlives the loop counts its iterations."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = {"steps": 0}

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            self.stats["steps"] += 1
            res = (z_new - z).norm()
            z = z_new
            if res < TOL:
                break
        return z


EVALUATIONS = 0


class GlobalCounter(Cell):
    def forward(self, x: Tensor) -> Tensor:
        def step(z: Tensor) -> Tensor:
            global EVALUATIONS
            EVALUATIONS += 1
            return self.f(z, x)

        return iterate(step, torch.zeros_like(x))


class NonlocalCounter(Cell):
    def forward(self, x: Tensor) -> Tensor:
        count = 0

        def step(z: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return self.f(z, x)

        z = iterate(step, torch.zeros_like(x))
        return z + 0.01 * count


class ListGrows(Cell):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        z, trace = torch.zeros_like(x), []
        for _ in range(CAP):
            z_new = self.f(z, x)
            trace.append((z_new - z).norm())
            z = z_new
            if trace[-1] < TOL:
                break
        return z, trace


class Prints(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            z_new = self.f(z, x)
            res = (z_new - z).norm()
            z = z_new
            print(k)
            if res < TOL:
                break
        return z


class Halving(Cell):
    """No fixed point is sought: the norm is to be brought below a bound."""

    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 0.1:
            x = x * 0.5
        return self.f(x, x)


class CosineTest(Cell):
    """The test does not see the length of the step."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.ones_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            same = torch.cosine_similarity(z_new, z, dim=-1).min()
            z = z_new
            if same > 0.9:
                break
        return z


class DependsOnStep(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            z_new = self.f(z, x / (1 + k))
            res = (z_new - z).norm()
            z = z_new
            if res < TOL:
                break
        return z


class IfInside(Cell):
    """A branch on data that is no exit."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            if z.norm() > 100:
                z = z * 0.5
            z = self.f(z, x)
        return z
