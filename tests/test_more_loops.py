"""More forms of loops end to end: rewritten right, kept right, or refused with a reason; and callables of every kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import compiled, largest_error, reference, tensor_of, value_and_grads
from tests.models.loops import CASES, D, Linear
from tests.models.more_loops import KEPT, MORE

FOUND = [name for name, case in MORE.items() if case.regions]
LEFT = [name for name, case in MORE.items() if not case.regions]


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    case = MORE[name]
    model, x = case.make()
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert [r.status for r in report.regions] == ["kept" if name in KEPT else "solve"] * case.regions, str(report)
    assert largest_error(found, reference(model, x)) < (1e-5 if name in KEPT else 2e-3)
    assert report.skipped == []


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    case = MORE[name]
    model, x = case.make()
    results = []
    run, report = compiled(model)
    for call in (run, model):
        torch.manual_seed(1)
        # written to in place by one of them, which a leaf that requires gradients does not allow
        results.append(value_and_grads(lambda x, call=call: call(x * 1.0), model, x))
    assert report.regions == []
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    (skipped,) = report.skipped
    assert skipped.reason is case.refused
    assert skipped.location.file.endswith(("loops.py", "more_loops.py"))


def iterate(f: Callable[[Tensor], Tensor], z: Tensor, n: int) -> Tensor:
    for _ in range(n):
        z = f(z)
    return z


class Owner:
    """No module: a method of a plain class compiles as well."""

    def __init__(self, f: nn.Module) -> None:
        self.f = f

    def solve(self, x: Tensor) -> Tensor:
        return iterate(lambda z: self.f(z, x), torch.zeros_like(x), 60)


def test_callables_that_are_no_modules() -> None:
    model, x = CASES["linear"].make()
    f: Any = model.f  # type: ignore[union-attr]

    def function(x: Tensor) -> Tensor:
        return iterate(lambda z: f(z, x), torch.zeros_like(x), 60)

    def flipped(n: int, x: Tensor) -> Tensor:
        return iterate(functools.partial(torch.func.functional_call, f, dict(f.named_parameters()), x=x), x, n) if n < 0 else function(x)

    expected = reference(model, x)
    for call in (function, Owner(f).solve, functools.partial(flipped, 60)):
        run, report = compiled(call)
        assert largest_error(value_and_grads(run, model, x), expected) < 2e-3
        assert [r.status for r in report.regions] == ["solve"]


def test_weights_as_arguments() -> None:
    """`torch.func.functional_call` on the whole model, with the weights as inputs of the compiled function."""
    model, x = CASES["linear"].make()

    def call(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,))

    run, report = compiled(call)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = copy.deepcopy(model)
    run(weights, x).sum().backward()
    expected(x).sum().backward()
    assert [r.status for r in report.regions] == ["solve"]
    for name, p in expected.named_parameters():
        torch.testing.assert_close(weights[name].grad, p.grad, rtol=2e-3, atol=1e-4)


def test_in_place_state_that_somebody_else_sees() -> None:
    """The initial state is read again after the loop has written to it: left alone, and right."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Linear()

        def forward(self, x: Tensor) -> Tensor:
            z = 0.5 * x
            seen = z.view(-1)
            for _ in range(10):
                z += 0.5 * (self.f(z.clone(), x) - z)
            return z + seen.view(-1, D)

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(4, D)
    run, report = compiled(model)
    torch.testing.assert_close(tensor_of(run(x)), model(x))
    assert report.regions == []
    assert [s.reason.name for s in report.skipped] == ["MUTATION"]
