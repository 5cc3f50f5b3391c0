"""The kernels as they are called in a solve, each with a state that holds n steps and can be put back to where it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from deq_compile.testing import broyden, gcr, iteration, reuse

from . import counts
from .counts import Count

# Bytes that one set of buffers may take. Shapes of more are left out.
LIMIT = 1.5e9


@dataclass(frozen=True)
class Shape:
    """B samples of D elements, n steps stored."""

    B: int
    D: int
    n: int

    @property
    def elements(self) -> int:
        return self.B * self.D


@dataclass(frozen=True)
class Subject:
    """A kernel at a shape: `reset` puts the state back, then `call` is what is timed."""

    name: str
    count: Count
    reset: Callable[[], None]
    call: Callable[[], object]


STEPS = (1, 5, 15, 40)
# The same number of elements as many small samples and as a few large ones; rows that are no powers of two apart.
SIZES = (
    (1, 32), (32, 32), (4, 250), (320, 32), (4, 2_500), (3_125, 32), (4, 25_000), (31_250, 32), (4, 250_000),
    (312_500, 32), (4, 2_500_000),
)  # fmt: skip
QUICK = (Shape(1, 1, 0), Shape(1, 1, 1), Shape(1, 1, 5), Shape(32, 32, 5), Shape(4, 2_500, 5), Shape(4, 2_500, 15))
KERNELS = ("step", "move", "make", "apply")


def shapes(quick: bool) -> list[Shape]:
    """The smallest first: B = D = 1 is what a call costs."""
    if quick:
        return list(QUICK)
    alone = [Shape(1, 1, n) for n in (0, 1, 5, 15, 40)]
    return alone + [Shape(B, D, n) for (B, D), n in itertools.product(SIZES, STEPS) if 4 * n * B * D < LIMIT]


def subjects(shape: Shape) -> Iterator[Subject]:
    """The kernels that make sense at a shape, one after the other: a basis has no more pairs than a row has elements, a
    factor M has at least two steps.

    Raises:
        RuntimeError: the state does not hold n steps of every sample, so that something else would be timed.
    """
    generator = torch.Generator().manual_seed(0)
    yield from _solve(shape, generator)
    if (shape.n < shape.D) and 2 * shape.n * shape.elements * counts.WORD < LIMIT:
        yield _adjoint(shape, generator)


def _body(shape: Shape, generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    """A diagonal contraction and noise, so that no number of steps brings the residual to zero, or to subnormal numbers."""
    slope = torch.linspace(-0.9, 0.9, shape.D) if shape.D > 1 else torch.tensor([0.5])
    shift = torch.randn(shape.B, shape.D, generator=generator)

    def body(z: torch.Tensor) -> torch.Tensor:
        return torch.randn(z.shape, generator=generator).mul_(0.1).addcmul_(slope, z).add_(shift)

    return body


def _check(kernel: str, shape: Shape, n: torch.Tensor, done: torch.Tensor) -> None:
    if (n != shape.n).any() or (done != iteration.RUNNING).any():
        raise RuntimeError(f"{kernel}: expected n = {shape.n} and all samples running at {shape}, got n {n}, done {done}")


def _solve(shape: Shape, generator: torch.Generator) -> Iterator[Subject]:
    B, D, n = shape.B, shape.D, shape.n
    body = _body(shape, generator)
    z = torch.zeros(B, D)
    state = broyden.new_state(z, max(n, 1), tol=0.0)
    for _ in range(n):
        broyden.step(state, z, body(z))
    _check("step", shape, state.n, state.done)
    f, before = body(z), z.clone()

    def reset() -> None:
        z.copy_(before)
        state.n.fill_(n)
        state.best.fill_(math.inf)  # the step is the best so far, and is kept, as in most steps of a solve

    yield Subject("step", counts.step(B, D, n), reset, lambda: broyden.step(state, z, f))
    reset()
    _check("step", shape, state.n, state.done)
    if n < 2:
        return
    yield Subject("make", counts.make(B, D, n), lambda: None, lambda: reuse.multisecant(state))
    operator = reuse.multisecant(state)
    yield Subject("apply", counts.apply(B, D, n), lambda: None, lambda: reuse.apply_multisecant(operator, f))


def _adjoint(shape: Shape, generator: torch.Generator) -> Subject:
    B, D, n = shape.B, shape.D, shape.n
    body = _body(shape, generator)
    state = gcr.new_state(torch.randn(B, D, generator=generator), None, n + 1, tol=0.0)
    for _ in range(n):
        gcr.move(state, body(state.w))
    _check("move", shape, state.n, state.done)
    jw, vectors = body(state.w), (state.x, state.r, state.w)
    before = [vector.clone() for vector in vectors]

    def reset() -> None:
        for vector, old in zip(vectors, before, strict=True):
            vector.copy_(old)
        state.n.fill_(n)
        state.best.fill_(math.inf)
        state.evaluations = n

    return Subject("move", counts.move(B, D, n), reset, lambda: gcr.move(state, jw))
