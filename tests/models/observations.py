"""Models that tell what their loop did: counters, residuals, flags and meters, as research code writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOL, CAP = 1e-6, 60


class Told(nn.Module):
    """z = tanh(W z + x), and what is told of the loop that finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(16, 16)
        nn.init.orthogonal_(self.W.weight, gain=0.6)
        self.depth: Any = 0
        self.residual: Any = None
        self.trace: list[float] = []
        self.info: dict[str, Any] = {}
        self.calls = 0
        self.meter = Meter()

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + x)

    def told(self) -> dict[str, Any]:
        return {"depth": self.depth, "residual": self.residual, "trace": self.trace, **self.info}


class Meter:
    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1


class CounterAfter(Told):
    def forward(self, x: Tensor) -> Tensor:
        z, k = torch.zeros_like(x), 0
        for k in range(CAP):  # noqa: B007
            new = self.f(z, x)
            done = (new - z).norm() < TOL * new.norm()
            z = new
            if done:
                break
        self.depth = k + 1
        return z


class AttributeCounts(Told):
    """The attribute is the loop's own counter, and its cap."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        self.depth = 0.0
        while self.depth < CAP:
            new = self.f(z, x)
            self.residual = ((new - z).norm() / new.norm()).item()
            z = new
            self.depth += 1.0
            if self.residual < TOL:
                break
        return z


class TraceKept(Told):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        self.trace, absolute = [], []
        for _ in range(CAP):
            new = self.f(z, x)
            self.trace.append(((new - z).norm() / new.norm()).item())
            absolute.append((new - z).norm().item())
            z = new
            if self.trace[-1] < TOL:
                break
        self.depth = len(self.trace)
        self.info = {"absolute": absolute[-1]}
        return z


class StateInADict(Told):
    """A splitting library's state: a dictionary of tuples and a cost that nobody computes."""

    def forward(self, x: Tensor) -> Tensor:
        state: dict[str, Any] = {"z": (torch.zeros_like(x),), "cost": None}
        k = 0
        while k < CAP:
            before = state
            state = {"z": (self.f(before["z"][0], x),), "cost": None}
            done = k > 1 and bool((state["z"][0] - before["z"][0]).norm() < TOL)
            k += 1
            if done:
                break
        self.depth = k
        return state["z"][0]


class MeterAfter(Told):
    """A meter that counts over all calls: the graph ends before it."""

    def forward(self, x: Tensor) -> Tensor:
        z, k, err = torch.zeros_like(x), 0, 1.0
        while err > TOL and k < CAP:
            new = self.f(z, x)
            err = (new - z).norm().item()
            z, k = new, k + 1
        self.meter.update(k)
        self.depth = k
        return z


class DictionaryAfter(Told):
    """The same with a dictionary: one number for all calls, under a key."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        z, err = torch.zeros_like(x), 1.0
        while err > TOL:
            new = self.f(z, x)
            err = (new - z).norm().item()
            z = new
        self.seen["calls"] += 1
        self.depth = self.seen["calls"]
        return z


class LeastIterations(Told):
    def forward(self, x: Tensor) -> Tensor:
        z, k = torch.zeros_like(x), 0
        for k in range(CAP):
            new = self.f(z, x)
            residual = ((new - z).norm() / new.norm()).item()
            z = new
            if k + 1 >= 9 and residual < TOL:
                break
        self.depth = k + 1
        return z


class CounterInTheState(Told):
    """A dictionary of the state, a counter of the dtype int32 and the last residual, as libraries in other languages write it."""

    def forward(self, x: Tensor) -> Tensor:
        s = {"z": torch.zeros_like(x), "k": torch.zeros((), dtype=torch.int32), "r": torch.full((len(x),), float("inf"))}
        for _ in range(CAP):
            new = self.f(s["z"], x)
            s = {"z": new, "k": s["k"] + 1, "r": (new.detach() - s["z"].detach()).norm(dim=1)}
        self.info = {name: value.detach() for name, value in s.items()}
        return s["z"]


class CounterUsed(Told):
    """What the counter comes to goes into the state."""

    def forward(self, x: Tensor) -> Tensor:
        z, k = torch.zeros_like(x), torch.zeros((), dtype=torch.int32)
        for _ in range(CAP):
            k = k + 1
            z = self.f(z, x) + 0.5 / k
        return z


class Averaged(Told):
    """The count goes into the result: for the loop alone to say."""

    def forward(self, x: Tensor) -> Tensor:
        z, k = torch.zeros_like(x), 0
        for k in range(CAP):  # noqa: B007
            new = self.f(z, x)
            done = (new - z).norm() < TOL * new.norm()
            z = new
            if done:
                break
        return z / (k + 1)


class TraceInTheResult(Told):
    def forward(self, x: Tensor) -> Tensor:
        z, trace = torch.zeros_like(x), []
        for _ in range(CAP):
            new = self.f(z, x)
            trace.append((new - z).norm().item())
            z = new
            if trace[-1] < TOL:
                break
        return z * (1 + sum(trace))


class AnotherMapLater(Told):
    """A branch on the counter that no traced iteration takes."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            new = self.f(z, x)
            if k > 20:
                new = 0.5 * new
            done = (new - z).norm() < 1e-12
            z = new
            if done:
                break
        return z


SERVED = (CounterAfter, AttributeCounts, TraceKept, StateInADict, MeterAfter, LeastIterations)
LEFT_ALONE = (Averaged, TraceInTheResult, AnotherMapLater, CounterUsed)
