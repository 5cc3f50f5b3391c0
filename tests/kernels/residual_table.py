"""Sequences of residuals, and how each of them has to end: one table for all implementations of the stopping rule."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_compile.kernels.iteration.reference import Stopped, classify_sequence
from deq_compile.kernels.iteration.state import Progress

D = 4
CAP = 24
TOL = 2.0**-10  # fp32 holds the settings exactly: Triton passes Python floats as fp32
Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Settings:
    floor: float
    relative: bool

    def expected(self, pairs: Pairs, falls: bool = True) -> Stopped:
        eps = torch.finfo(torch.float64).eps
        return classify_sequence(pairs, tol=TOL, floor=self.floor, eps=eps, relative=self.relative, cap=CAP, falls=falls)


SETTINGS = [Settings(0.0, True), Settings(2.0**-6, True), Settings(0.25, True), Settings(0.0, False), Settings(2.0**-6, False)]


def falling(ratio: float, start: float = 1.0, size: float = 1.0) -> Pairs:
    return [(start * ratio**k, size) for k in range(CAP)]


def by_hand() -> list[Pairs]:
    """What each of them is for, in the order below."""
    stuck = [(2.0**-7 * (1 + 0.01 * (k % 2)), 1.0) for k in range(CAP)]
    return [
        falling(0.3),  # converges
        falling(1.0),  # stays: the cap
        falling(0.9),  # slow
        falling(0.5, start=TOL / 2),  # begins within the tolerance
        [(0.0, 1.0)] * CAP,  # begins at the fixed point
        [(1.0, 2.0**k) for k in range(CAP)],  # |f| grows without bound, |g| does not fall: no fixed point
        [(2.0**-k, 2.0**k) for k in range(CAP)],  # both
        stuck,  # stagnates below a floor
        [(1.0, 1.0), *stuck[1:]],  # falls to it
        [(1.0, 1.0), (0.5, 1.0), (math.nan, 1.0)] + [(0.1, 1.0)] * CAP,  # fails in the middle
        [(math.nan, math.nan)] * CAP,  # was never finite
        [(math.inf, 1.0)] * CAP,
        [(0.5, 1.0), (2.0, 1.0), (0.4, 1.0), (3.0, 1.0)] * (CAP // 4),  # up and down
        [(0.3, 0.0)] * CAP,  # f = 0
        [(1e-30, 1e-30)] * CAP,  # as small as the norm's own eps and below
        [(1e-3 * 0.85**k, 1.0) for k in range(CAP)],  # gains 15 % each time, below the floor
    ]


def at_random(count: int, seed: int = 0) -> list[Pairs]:
    """Walks of residuals and sizes, with a failure now and then."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        g, f, rate, growth = 10 ** draw.uniform(-4, 2), 10 ** draw.uniform(-2, 2), draw.uniform(0.2, 1.1), draw.uniform(0.8, 1.4)
        pairs: Pairs = []
        for _ in range(CAP):
            pairs.append((math.nan, f) if draw.random() < 0.01 else (g, f))
            g, f = g * rate * draw.uniform(0.6, 1.4), f * growth ** draw.uniform(-1, 1)
        found.append(pairs)
    return found


TABLE = [*by_hand(), *at_random(200)]


def tensors(sequences: Sequence[Pairs], k: int) -> tuple[Tensor, Tensor]:
    """z and f (B, D) in float64 whose residuals are those of the k-th evaluation: f along one axis, f - z along another."""
    g = torch.tensor([pairs[k][0] for pairs in sequences], dtype=torch.float64)
    size = torch.tensor([pairs[k][1] for pairs in sequences], dtype=torch.float64)
    f = torch.zeros(len(sequences), D, dtype=torch.float64)
    f[:, 0] = torch.where(torch.isfinite(g), size, g)
    z = torch.zeros_like(f)
    z[:, 0] = torch.where(torch.isfinite(size), size, 0.0)
    z[:, 1] = torch.where(torch.isfinite(g), -g, 0.0)
    return z, f


def drive(progress: Progress, z: Tensor, step: Callable[[Tensor, Tensor, bool], None], sequences: Sequence[Pairs]) -> None:
    """Give an implementation all sequences at once, a sample each, whatever it makes of the iterates."""
    for k in range(CAP):
        given, f = tensors(sequences, k)
        z.copy_(given)
        step(z, f, k + 1 == CAP)


def check(progress: Progress, expected: Sequence[Stopped], sequences: Sequence[Pairs]) -> None:
    """Code, evaluations, best residual, and the iterate that this belongs to."""
    for i, (want, pairs) in enumerate(zip(expected, sequences, strict=True)):
        got = int(progress.done[i]), int(progress.iterations[i])
        assert got == (want.code, want.evaluations), (i, pairs[:8], want)
        torch.testing.assert_close(float(progress.best[i]), want.best, rtol=1e-9, atol=1e-300)
        if want.at:
            z, _ = tensors([pairs], want.at - 1)
            torch.testing.assert_close(progress.z_best[i], z[0], rtol=1e-12, atol=0)
