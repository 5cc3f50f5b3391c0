"""The truth in float64: the fixed point, and the implicit gradient there.

The gradient of L at z* = f(z*, θ) is (∂f/∂θ)ᵀ w with w = ∂L/∂z + Jᵀ w. Both equations are contractions on all benchmark
problems (norm at most 0.95), so that plain iteration reaches 1e-12 in at most 600 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import machine

from .cases import Case, floating

ACCURACY = 1e-12
MAX_STEPS = 5000


@dataclass
class Reference:
    """Outputs and gradients (of `Case.leaves`, in their order) in float64, and how they were obtained."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    how: str


def reference(case: Case) -> Reference:
    """Of a fresh case, which is changed to float64 here. All cores help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(machine.usable_cores())
    try:
        return _fixed_point(case) if case.loop is not None else _loop(case)
    finally:
        torch.set_num_threads(threads)


def _fixed_point(case: Case) -> Reference:
    loop = case.loop
    assert loop is not None
    case.double()
    (x,) = case.inputs
    with torch.no_grad():
        u = loop.injection(x)
        z = iterate(lambda z: loop.body(z, u), torch.zeros_like(x))
    state = z.detach().requires_grad_()
    f = loop.body(state, loop.injection(x))
    (q,) = torch.autograd.grad(case.loss(state), state)
    w = iterate(lambda w: torch.autograd.grad(f, state, w, retain_graph=True)[0] + q, q)
    case.clear()
    f.backward(w)
    return Reference([z], case.gradients(), f"fixed point and adjoint to {ACCURACY:g}")


def iterate(step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Repeat until the relative change is below ACCURACY.

    Raises:
        RuntimeError: that did not happen.
    """
    for _ in range(MAX_STEPS):
        new = step(start)
        change = float((new - start).norm() / new.norm().clamp_min(1e-300))
        start = new
        if change < ACCURACY:
            return start
    raise RuntimeError(f"expected the reference to converge within {MAX_STEPS} steps; the last change was {change:.1e}")


def _loop(case: Case) -> Reference:
    """A real model's own loop in float64: what the user wrote is what counts."""
    case.double()
    outputs = case.model(*case.inputs)
    case.clear()
    case.loss(outputs).backward()
    return Reference([t.detach() for t in floating(outputs)], case.gradients(), "the user's loop, backpropagated")


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """|a - b| / |b| over all tensors as one vector."""
    difference = sum(float((a.double() - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((difference / sum(float(b.square().sum()) for b in expected)) ** 0.5)


def residual(case: Case, outputs: list[Tensor]) -> float | None:
    """max over samples of |f(z) - z| / |f(z)| at a step's result; None where the body is not at hand."""
    if case.loop is None:
        return None
    with torch.no_grad():
        z = outputs[0].detach()
        f = case.loop.body(z, case.loop.injection(case.inputs[0]))
        change = (f - z).flatten(1).norm(dim=1) / (f.flatten(1).norm(dim=1) + 1e-9)
        return float(change.max())
