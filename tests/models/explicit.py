"""Models that say `fixed_point` outright."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deq_compile import fixed_point

from .form import Form
from .parts import Linear

EXACT = {"tol": 1e-6, "backward_tol": 1e-5}


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Model(nn.Module):
    """The same map solved, or iterated 300 times: the reference."""

    loop = False
    more: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.scale = Linear(), Linear(), nn.Parameter(torch.tensor(0.3))

    def solve(self, f: Callable[[Any], Any], z: Any) -> Any:
        if not self.loop:
            return fixed_point(f, z, **EXACT, **self.more)
        for _ in range(300):
            z = f(z)
        return z


class Closure(Model):
    """A parameter, a tensor computed before, and two submodules are all captured by the lambda."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(x, x)
        return self.solve(lambda z: self.f(z, y) * self.scale, torch.zeros_like(x))


class Tuple(Model):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.solve(lambda s: (self.f(s[0], x + 0.3 * s[1]), self.g(s[1], 0.3 * s[0])), (torch.zeros_like(x), x))
        return a * b


class Dict(Model):
    def forward(self, x: Tensor) -> Tensor:
        def step(s: dict[str, Any]) -> dict[str, Any]:
            return {"h": self.f(s["h"], x), "more": [self.g(s["more"][0], 0.3 * s["h"])]}

        out = self.solve(step, {"h": torch.zeros_like(x), "more": [torch.zeros_like(x)]})
        return out["h"] + out["more"][0]


class Named(Model):
    def forward(self, x: Tensor) -> Tensor:
        out = self.solve(lambda s: Pair(self.f(s.a, 0.3 * s.b), self.g(s.b, x)), Pair(torch.zeros_like(x), torch.zeros_like(x)))
        return out.a + out.b


class PassedThrough(Model):
    """Part of the state is not changed by f."""

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(lambda s: (self.f(s[0], s[1]), s[1].detach() * 0 + x), (torch.zeros_like(x), x))[0]


class Autocast(Model):
    def forward(self, x: Tensor) -> Tensor:
        def step(z: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                return self.f(z, x)

        return self.solve(step, torch.zeros_like(x))


class Coupled(Model):
    """Rows read each other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(lambda z: torch.tanh(torch.roll(self.f.W(z), 1, 0) + x), torch.zeros_like(x))


class AModule(Model):
    """f is a module, and needs nothing but the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(self.net, torch.zeros_like(x))


EXPLICIT: dict[str, Form] = {
    "closure": Form(Closure, kind="fixed_point"),
    "tuple": Form(Tuple, kind="fixed_point"),
    "dictionary and list": Form(Dict, kind="fixed_point"),
    "named tuple": Form(Named, kind="fixed_point"),
    "part of the state passed through": Form(PassedThrough, kind="fixed_point"),
    "autocast inside": Form(Autocast, kind="fixed_point"),
    "rows that read each other": Form(Coupled, kind="fixed_point"),
    "a module": Form(AModule, kind="fixed_point"),
}
