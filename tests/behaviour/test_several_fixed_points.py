"""A body with several fixed points is followed along the loop's own iterates, and one with a single one is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.multistable.bodies import BODIES
from bench.multistable.cli import contraction
from deq_compile import record_solves
from deq_compile.region import schedule
from deq_compile.region import site as sites
from tests.helpers import compiled, largest_error, reference, value_and_grads


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("name", ["recall", "bistable", "projections"])
def test_no_batch_ends_in_another_fixed_point(name: str, injected: bool) -> None:
    body = BODIES[name]
    loop = body.loop(injected)
    run, report = compiled(loop, tol=None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for i in range(12):
            x = body.start(i)
            right = loop(x.double()).flatten(1)
            off = (run(x).double().flatten(1) - right).norm(dim=1) / right.norm(dim=1)
            assert off.max() < 1e-2
    assert report.regions[0].status in ("follow", "kept")
    assert "follow" not in report.regions[0].status or "follow " in str(report)


def test_following_stops_when_converged_and_keeps_the_implicit_gradient() -> None:
    body = BODIES["bistable"]
    W = nn.Parameter(torch.eye(8))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = W

        def forward(self, x: Tensor) -> Tensor:
            z = x
            for _ in range(40):
                z = torch.tanh(2.5 * (z @ self.W) + 0.1 * z.roll(1, -1))
            return z

    model, x = Model(), body.start(0)

    def gradient(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        y = call(x)
        (y * torch.linspace(-1, 1, 8)).sum().backward()
        return [y.detach(), model.W.grad.clone()]

    run, report = compiled(model)
    expected = gradient(model)
    for _ in range(4):
        with record_solves() as solves:
            found = gradient(run)
        assert largest_error(found, expected) < 2e-3
    assert report.regions[0].status == "follow"
    assert (solves[0].status, solves[0].vjps is not None) == ("follow", True)
    assert solves[0].iterations < 30


def test_a_start_that_needs_a_gradient_keeps_the_loop() -> None:
    """Between two fixed points the start's own gradient is as large as one likes; the fixed point's is blind to it."""
    body = BODIES["bistable"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.start, self.W = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            z = 0.1 * self.start(x)
            for _ in range(40):
                z = torch.tanh(2.5 * z + 0.1 * self.W(z) + 0.01 * x)
            return z

    model = Model()
    run, report = compiled(model)
    for i in range(5):
        x = body.start(i)
        assert largest_error(value_and_grads(run, model, x), reference(model, x)) < 1e-3
    assert report.regions[0].status == "kept"


def test_what_an_input_reaches_through_the_start_alone_is_suspected() -> None:
    """Such a fixed point can depend on the input only if there are several. No solve is tried, not even once."""

    def recall(x: Tensor) -> Tensor:
        z = x
        for _ in range(30):
            z = torch.tanh(0.5 * z + 0.3)  # one fixed point all the same: suspected, and right
        return z

    run, report = compiled(recall, tol=None)
    with record_solves() as solves:
        run(torch.randn(3, 4))
    assert [s.status for s in solves] == ["follow"]
    assert report.regions[0].status == "follow"
    assert "the input reaches it through its initial state alone" in str(report)

    def injected(x: Tensor) -> Tensor:
        z = x
        for _ in range(30):
            z = torch.tanh(0.5 * z + x)
        return z

    run, report = compiled(injected, tol=None)
    run(torch.randn(3, 4))
    assert report.regions[0].status == "solve"


@pytest.mark.parametrize("grad", [False, True])
def test_comparisons_are_close_at_first_and_go_on(grad: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(30):
                z = torch.tanh(0.5 * z + x)
            return z

    model, x = Model(), torch.randn(3, 4, requires_grad=grad)
    run, report = compiled(model)
    compared = []
    for call in range(20):
        with record_solves() as solves:
            run(x)
        if solves[0].evaluations > 30:
            compared.append(call)
    assert compared == [0, 1, 2, 4, 8, 16]
    site = sites.site(report.regions[0].key)
    site.calls, found = 200, []
    for call in range(200, 2001):
        site.calls = call
        found += [call] if site.due() else []
    assert found == list(range(site.period, 2001, site.period))
    # what a comparison takes, in units of evaluations, is at most a hundredth of what the calls between two take
    between = site.period * schedule.USUAL_CALL * (2 if grad else 1)
    assert 0.0101 * between >= 30 + schedule.USUAL_COMPARISON


def test_honest_bodies_are_solved() -> None:
    statuses = [contraction(seed)["status"] for seed in range(4)]
    assert "follow" not in statuses
    assert statuses.count("solve") >= 2
