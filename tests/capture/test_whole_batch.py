"""A solver whose tolerance is the whole batch's is taken at that; others sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import record_solves
from deq_compile.families.solvers import Family, family_of
from tests.helpers import compiled
from tests.models.equilibrium_lm import anderson

Map = Callable[[Tensor], Tensor]


def norm_of_all(f: Map, z0: Tensor, tol: float = 1e-4, max_iter: int = 60) -> Tensor:
    z = z0
    for _ in range(max_iter):
        new = f(z)
        if (new - z).norm() <= tol * new.norm():
            return new
        z = new
    return z


def worst_sample(f: Map, z0: Tensor, tol: float = 1e-4, max_iter: int = 60) -> Tensor:
    z = z0
    for _ in range(max_iter):
        new = f(z)
        gap, size = (new - z).flatten(1).norm(dim=1), new.flatten(1).norm(dim=1)
        if (gap / (size + 1e-9)).max() <= tol:
            return new
        z = new
    return z


def mean_of_samples(f: Map, z0: Tensor, tol: float = 1e-4, max_iter: int = 60) -> Tensor:
    z = z0
    for _ in range(max_iter):
        new = f(z)
        gap, size = (new - z).flatten(1).norm(dim=1), new.flatten(1).norm(dim=1)
        if (gap / (size + 1e-9)).mean() <= tol:
            return new
        z = new
    return z


def largest_element(f: Map, z0: Tensor, tol: float = 1e-4, max_iter: int = 60) -> Tensor:
    z = z0
    for _ in range(max_iter):
        new = f(z)
        if (new - z).abs().max() <= tol * new.abs().max():
            return new
        z = new
    return z


def absolute(f: Map, z0: Tensor, tol: float = 1e-4, max_iter: int = 60) -> Tensor:
    z = z0
    for _ in range(max_iter):
        new = f(z)
        if (new - z).norm() <= tol:
            return new
        z = new
    return z


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize(
    ("solver", "whole"),
    [(norm_of_all, True), (worst_sample, False), (mean_of_samples, False), (largest_element, False), (absolute, False)],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_a_tolerance_is_of(solver: Any, whole: bool, dims: int) -> None:
    family = family_of(solver, dims)
    assert isinstance(family, Family)
    assert family.whole is whole


def test_of_anderson() -> None:
    family = family_of(anderson, 3)
    assert isinstance(family, Family)
    assert family.whole


class OneSmallSample(nn.Module):
    """All samples but the last are large, and solved at once."""

    def __init__(self, solver: Any) -> None:
        super().__init__()
        self.solver, self.W = solver, nn.Linear(16, 16, bias=False)
        nn.init.orthogonal_(self.W.weight, gain=0.9)

    def forward(self, x: Tensor) -> Tensor:
        rate = torch.ones(len(x), 1) * torch.arange(1, len(x) + 1)[:, None].eq(len(x))
        z: Tensor = self.solver(lambda z: rate * torch.tanh(self.W(z)) + x, torch.zeros_like(x), tol=1e-4)
        return z


@pytest.mark.parametrize(("solver", "few"), [(norm_of_all, True), (worst_sample, False)], ids=["whole", "samples"])
def test_a_solve_ends_where_the_call_would(solver: Any, few: bool) -> None:
    torch.manual_seed(0)
    model, x = OneSmallSample(solver), torch.randn(4, 16) * torch.tensor([1e3, 1e3, 1e3, 1e-1])[:, None]
    run, report = compiled(model, tol=None)
    with record_solves() as solves, torch.no_grad():
        z = run(x)
        right = model.double()(x.double())
    assert [region.status for region in report.regions] == ["solve"]
    assert (solves[-1].iterations_max < 5) is few
    assert float((z - right).norm() / right.norm()) < 1e-4
    if not few:
        assert float((z - right)[3].norm() / right[3].norm()) < 1e-3


def tells(f: Map, z0: Tensor, tol: float = 1e-4, max_iter: int = 60) -> Tensor:
    z = z0
    for k in range(max_iter):
        new = f(z)
        gap = ((new - z).norm() / new.norm()).item()
        print("iteration", k, gap)
        z = new
        if gap < tol:
            break
    return z


def test_a_trial_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(family_of(tells, 2), Family)
    assert capsys.readouterr() == ("", "")
