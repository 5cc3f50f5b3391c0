"""Loops that do something else after some iterations, by ways in which Python can choose that no traced iteration shows."""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .attached import picard

CAP, LATE = 60, 25
RATES = [1.0] * LATE + [0.5] * CAP


class Loop(nn.Module):
    """z = step(z, x, k, what `start` made), up to a tolerance that is not met before the cap."""

    def __init__(self, start: Callable[[Loop], Any], step: Callable[[Loop, Tensor, int, Any], Tensor]) -> None:
        super().__init__()
        self.W, self.V = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.orthogonal_(self.W.weight, gain=0.6)
        nn.init.orthogonal_(self.V.weight, gain=0.3)
        self.start, self.step, self.x = start, step, torch.zeros(())

    def f(self, z: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.x)

    def g(self, z: Tensor) -> Tensor:
        return torch.tanh(self.V(z) + self.x)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        z, made = torch.zeros_like(x), self.start(self)
        for k in range(CAP):
            new = self.step(self, z, k, made)
            done = (new - z).norm() < 1e-12
            z = new
            if done:
                break
        return z


def _nothing(_: Loop) -> None:
    return None


class _Table:
    def __getitem__(self, k: int) -> float:
        return 1.0 if k < LATE else 0.5


class _Ticker:
    n = 0

    def __call__(self) -> float:
        self.n += 1
        return 1.0 if self.n < LATE else 0.5


def _closure(_: Loop) -> Callable[[], float]:
    n = 0

    def tick() -> float:
        nonlocal n
        n += 1
        return 1.0 if n < LATE else 0.5

    return tick


def _generator(_: Any) -> Iterator[float]:
    for i in range(CAP + 1):
        yield 1.0 if i < LATE else 0.5


def _matched(m: Loop, z: Tensor, k: int, _: Any) -> Tensor:
    match k:
        case 59:
            return m.f(z) + 1
        case _:
            return m.f(z)


def _more_often(m: Loop, z: Tensor, k: int, _: Any) -> Tensor:
    out = m.f(z)
    for _ in range(k - 30):
        out = 0.9 * out
    return out


def _sliced(m: Loop, z: Tensor, k: int, rates: list[float]) -> Tensor:
    out = m.f(z)
    for rate in rates[k : k + 2]:
        out = rate * out
    return out


def _tried(m: Loop, z: Tensor, k: int, rates: list[float]) -> Tensor:
    try:
        rate = rates[k]
    except IndexError:
        rate = 0.5
    return rate * m.f(z)


def _inner(m: Loop, z: Tensor, k: int, _: Any) -> Tensor:
    out, j = m.f(z), k
    while j > LATE:
        out, j = 0.9 * out, j - 10
    return out


def _broken_off(m: Loop, z: Tensor, k: int, rates: Any) -> Tensor:
    rate = 0.0
    for _, rate in rates:  # noqa: B007
        break
    return rate * m.f(z)


def _emptied(m: Loop, z: Tensor, k: int, left: set[int]) -> Tensor:
    left.discard(k)
    return (1.0 if left else 0.5) * m.f(z)


_BY_COUNTER: dict[str, Any] = {
    "conditional expression": lambda m, z, k, _: m.f(z) * (1.0 if k < LATE else 0.5),
    "truth": lambda m, z, k, _: m.f(z) + (0.0 if k - 59 else 1.0),
    "not": lambda m, z, k, _: m.f(z) + (1.0 if not k - 59 else 0.0),
    "match": _matched,
    "max": lambda m, z, k, _: m.f(z) + 0.1 * max(k - 30, 0),
    "int": lambda m, z, k, _: m.f(z) + 0.1 * int(k / 30),
    "floor": lambda m, z, k, _: m.f(z) + 0.1 * math.floor(k / 30),
    "shift": lambda m, z, k, _: m.f(z) + (k >> 5),
    "abs": lambda m, z, k, _: m.f(z) * (0.5 if abs(k - 15) > 20 else 1.0),
    "power": lambda m, z, k, _: m.f(z) * (1.0 if 0.97**k > 0.5 else 0.5),
    "text": lambda m, z, k, _: m.f(z) + (1.0 if str(k) == "59" else 0.0),
    "any": lambda m, z, k, _: m.f(z) * (0.5 if any(k >= a for a in (LATE, 40)) else 1.0),
    "range": _more_often,
    "inner while": _inner,
    "tensor of it": lambda m, z, k, _: m.f(z) * (0.5 if bool(torch.tensor(k) > LATE) else 1.0),
}
_BY_STATE: dict[str, tuple[Any, Any]] = {
    "dict.get": (lambda _: {59: 3.0}, lambda m, z, k, t: t.get(k, 1.0) * m.f(z)),
    "dict.pop": (lambda _: dict(enumerate(RATES)), lambda m, z, k, t: t.pop(k) * m.f(z)),
    "modules by index": (lambda m: [m.f] * LATE + [m.g] * CAP, lambda m, z, k, t: t[k](z)),
    "modules by next": (lambda m: iter([m.f] * LATE + [m.g] * CAP), lambda m, z, k, t: next(t)(z)),
    "modules by pop": (lambda m: [m.f] * LATE + [m.g] * CAP, lambda m, z, k, t: t.pop(0)(z)),
    "rates by next": (lambda _: iter(RATES), lambda m, z, k, t: next(t) * m.f(z)),
    "rates by pop": (lambda _: list(RATES), lambda m, z, k, t: t.pop(0) * m.f(z)),
    "rates by popleft": (lambda _: collections.deque(RATES), lambda m, z, k, t: t.popleft() * m.f(z)),
    "rates by slices": (lambda _: RATES, _sliced),
    "rates until there are none": (lambda _: RATES[:LATE], _tried),
    "enumerate": (lambda _: enumerate(RATES), _broken_off),
    "count": (lambda _: itertools.count(), lambda m, z, k, t: m.f(z) * (1.0 if next(t) < LATE else 0.5)),
    "generator": (_generator, lambda m, z, k, t: next(t) * m.f(z)),
    "closure": (_closure, lambda m, z, k, t: t() * m.f(z)),
    "partial": (lambda _: functools.partial(max, 0), lambda m, z, k, t: m.f(z) + 0.1 * t(k - 30)),
    "object that is called": (lambda _: _Ticker(), lambda m, z, k, t: t() * m.f(z)),
    "object with items": (lambda _: _Table(), lambda m, z, k, t: t[k] * m.f(z)),
    "set": (lambda _: set(range(LATE)), _emptied),
    "constant tensor": (lambda _: torch.tensor(RATES), lambda m, z, k, t: t[k].item() * m.f(z)),
}
OTHERS_LATER = {name: (_nothing, step) for name, step in _BY_COUNTER.items()} | _BY_STATE

# What does not depend on the iteration, or not before the cap: these are solved.
ALIKE: dict[str, tuple[Any, Any]] = {
    "constants compared": (_nothing, lambda m, z, k, _: m.f(z) * (0.5 if max(LATE, 3) < 5 else 1.0)),
    "two constants at one place": (_nothing, lambda m, z, k, _: _alike(_alike(m.f(z), 3), 4)),
    "beyond the cap": (_nothing, lambda m, z, k, _: m.f(z) * (0.5 if k > CAP + 1 else 1.0)),
    "a list that is written": (lambda _: [], lambda m, z, k, t: (t.append(k), m.f(z))[1]),
    "a fresh iterator": (lambda _: [1.0, 0.5], lambda m, z, k, t: next(iter(t)) * m.f(z)),
    "types": (_nothing, lambda m, z, k, _: m.f(z) if isinstance(k, int) else z),
}


def _alike(z: Tensor, n: int) -> Tensor:
    return z if n > 2 else 0.5 * z


class Called(Loop):
    """A solver is called with a function that holds a state of its own; `start` makes it."""

    def __init__(self, start: Callable[[Loop], Any]) -> None:
        super().__init__(start, lambda m, z, k, _: z)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        z, _ = picard(self.start(self), torch.zeros_like(x), max_iter=CAP, tol=1e-12)
        return z


def _nonlocal(m: Loop) -> Callable[[Tensor], Tensor]:
    n = 0

    def f(z: Tensor) -> Tensor:
        nonlocal n
        n += 1
        return m.f(z) * (1.0 if n < LATE else 0.5)

    return f


def _holding(make: Callable[[], Any], take: Callable[[Any], float]) -> Callable[[Loop], Callable[[Tensor], Tensor]]:
    def start(m: Loop) -> Callable[[Tensor], Tensor]:
        held = make()
        return lambda z: take(held) * m.f(z)

    return start


def _left(left: set[int]) -> float:
    if left:
        left.pop()
    return 1.0 if left else 0.5


HELD: dict[str, Callable[[Loop], Callable[[Tensor], Tensor]]] = {
    "nonlocal": _nonlocal,
    "iterator": _holding(lambda: iter(RATES), next),
    "list": _holding(lambda: list(RATES), lambda rates: rates.pop(0)),
    "deque": _holding(lambda: collections.deque(RATES), lambda rates: rates.popleft()),
    "generator": _holding(lambda: _generator(None), next),
    "set": _holding(lambda: set(range(LATE)), _left),
    "count": _holding(itertools.count, lambda n: 1.0 if next(n) < LATE else 0.5),
    "object": _holding(_Ticker, lambda ticker: ticker()),
}
