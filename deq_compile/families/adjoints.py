"""What code in a backward does to a cotangent: found out by running it on a small problem whose answer is known.

Implicit gradients are attached by a hook on z, or by a `torch.autograd.Function` that passes z through; both get hold of
f(z0) and z0 and call `torch.autograd.grad(f(z0), z0, w)`. On a linear map with a known Jacobian J their result tells which of
these they compute of a cotangent q: w = q + J^T w (an implicit gradient, solved to some tolerance), q + J^T q + ... (a few terms
of the Neumann series), or q itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .trial import unnoticed

CONTRACTION, EXPANSION = 0.6, 1.7  # norms of J: in the second nothing may be clipped
SCALES = (1.0, 1e3)  # of the cotangent, to which a gradient is linear
MOST_TERMS = 8
WORST = 0.05  # relative error of what still is a solve
LEAST_TOL = 1e-6


@dataclass(frozen=True)
class Adjoint:
    """A backward: the tolerance of its solve, or the number of terms of the Neumann series where that is not None."""

    tol: float
    terms: int | None = None


class Toy:
    """f(z) = c S z + sum_i a_i x_i, with S a cyclic shift, for states of `dims` dimensions: z0, f(z0), and the inputs x_i."""

    def __init__(self, dims: int, inputs: int, contraction: float) -> None:
        shape = (2, 3, 2, 2, 2, 2)[: max(dims, 1)]
        generator = torch.Generator().manual_seed(0)
        self.contraction = contraction
        self.weights = [0.5 + 0.25 * i for i in range(inputs)]
        self.z0 = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        self.inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(inputs)]
        self.q = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.f = contraction * torch.roll(self.z0, 1, -1)
        for a, x in zip(self.weights, self.inputs, strict=True):
            self.f = self.f + a * x

    def transposed(self, w: Tensor) -> Tensor:
        return self.contraction * torch.roll(w, -1, -1)

    def terms(self, q: Tensor, count: int) -> Tensor:
        """The first terms of the Neumann series."""
        w = q
        for _ in range(count - 1):
            w = q + self.transposed(w)
        return w


# From a problem and a cotangent to what the code makes of it; None where it cannot be told.
Run = Callable[[Toy, Tensor], Tensor | None]


def kind_of(run: Run, dims: int, inputs: int) -> Adjoint | str | None:
    """What a backward computes. A text where it is an adjoint with something more to it; None where it is none, or cannot be
    tried out."""
    try:
        with torch.enable_grad(), unnoticed():
            return _kind_of(run, dims, inputs)
    except Exception:  # whatever code does that is called with what it did not expect
        return None


def _kind_of(run: Run, dims: int, inputs: int) -> Adjoint | str | None:
    errors, found = [], []
    for scale in SCALES:
        toy = Toy(dims, inputs, CONTRACTION)
        w = run(toy, scale * toy.q)
        if w is None:
            return None
        found.append(w / scale)
        errors.append(_distance(found[-1], toy.terms(toy.q, 200)))
    for terms in range(1, MOST_TERMS):
        exact = [_distance(w, toy.terms(toy.q, terms)) < 1e-9 for w in found]
        if any(exact):
            return _series(run, dims, inputs, terms) if all(exact) else "it clips the cotangent"
    if max(errors) > WORST:
        return None
    if _distance(*found) > max(errors) * 2 + 1e-9:
        return "it is not linear in the cotangent"
    return Adjoint(max(errors[0], LEAST_TOL))


def _series(run: Run, dims: int, inputs: int, terms: int) -> Adjoint | str:
    """The same where J stretches: code that clips a product shows here."""
    toy = Toy(dims, inputs, EXPANSION)
    w = run(toy, toy.q)
    if w is None or _distance(w, toy.terms(toy.q, terms)) > 1e-9:
        return "it clips a product with the Jacobian"
    return Adjoint(0.0, terms)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def through_function(apply: Callable[..., object], arguments: Callable[[Toy], Sequence[object]]) -> Run:
    """How to run a `torch.autograd.Function` whose result is z, or f(z0): w is read off the gradient of each input."""

    def run(toy: Toy, q: Tensor) -> Tensor | None:
        out = apply(*arguments(toy))
        if not isinstance(out, Tensor) or out.grad_fn is None or not any(torch.equal(out, z) for z in (toy.z0, toy.f)):
            return None
        grads = torch.autograd.grad(out, toy.inputs, q.to(out.dtype), allow_unused=True)
        found = [None if g is None else g / a for g, a in zip(grads, toy.weights, strict=True)]
        first = next((w for w in found if w is not None), None)
        same = first is not None and all(w is not None and torch.allclose(w, first) for w in found)
        return first if same else None

    return run
