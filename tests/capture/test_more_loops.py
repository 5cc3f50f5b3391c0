"""More forms of loops end to end: rewritten right, kept right, or refused with a reason; and callables of every kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import compiled, largest_error, reference, tensor_of, value_and_grads
from tests.models.loops import CASES
from tests.models.more_loops import KEPT, MORE, InPlaceInput
from tests.models.parts import Case, D, Linear

FOUND = [name for name, case in MORE.items() if case.regions]
LEFT = [name for name, case in MORE.items() if not case.regions]


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    case = MORE[name]
    model, x = case.make()
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert [r.status for r in report.regions] == ["kept" if name in KEPT else "solve"] * case.regions, str(report)
    expected = reference(model, x)
    # What made the initial state has a gradient of J^60 in the loop, and of 0 in a solve: both count as 0.
    largest = max(float(b.norm()) for b in expected)
    small = [i for i, b in enumerate(expected) if float(b.norm()) < 1e-6 * largest]
    assert all(float(found[i].norm()) < 1e-5 * largest for i in small)
    pairs = [(a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if i not in small]
    assert largest_error(*map(list, zip(*pairs, strict=True))) < (1e-5 if name in KEPT else 2e-3)
    assert report.skipped == []


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    case = MORE[name]
    model, x = case.make()
    results = []
    run, report = compiled(model)
    # Not with the model itself: torch recomputes a compiled checkpoint's dropout from another random state.
    for call in (run, torch.compile(copy.deepcopy(model), backend="eager")):
        torch.manual_seed(1)
        results.append(value_and_grads(call, call._orig_mod, x))
    assert report.regions == []
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    (skipped,) = report.skipped
    assert skipped.reason is case.refused
    assert Path(skipped.location.file).parent.name == "models"


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

    def with_count(n: int, x: Tensor) -> Tensor:
        weights = dict(f.named_parameters())
        return iterate(lambda z: torch.func.functional_call(f, weights, (z, x)), torch.zeros_like(x), n)

    expected = reference(model, x)
    for call in (function, Owner(f).solve, functools.partial(with_count, 60)):
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


def test_in_place_on_the_callers_tensor() -> None:
    model, x = Case(InPlaceInput, 0).make()
    run, report = compiled(model)
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(run(mine), model(theirs))
    torch.testing.assert_close(mine, theirs)
    assert [s.reason.name for s in report.skipped] == ["MUTATION"]


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
