"""What a loop says of itself is served from its solve, in one graph, for any number of calls; what is computed with it is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import record_solves
from tests.helpers import compiled, value_and_grads
from tests.models.observations import (
    LEFT_ALONE,
    SERVED,
    CounterInTheState,
    DictionaryAfter,
    LeastIterations,
    MeterAfter,
    Told,
    TraceKept,
)

CALLS = 30
# Dynamo asks a tensor that it takes over behind a graph break for its gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def close(found: list[Any], wanted: list[Any], tol: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.__name__)
def test_served_in_one_graph_for_thirty_calls(kind: type[Told]) -> None:
    """One compilation, the solve's own count in the place of the loop's, and Python numbers where Python numbers were."""
    torch.manual_seed(0)
    model = kind()
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=None, backward_tol=1e-6, fullgraph=False)
    for call in range(CALLS):
        x = torch.randn(4, 16)
        with record_solves() as solves:
            run(x)
        assert solves[-1].iterations_max is not None
        assert type(model.depth) is type(twin.depth) or call == 0
        twin(x)
        assert model.depth == pytest.approx(solves[-1].iterations_max, abs=1) or solves[-1].status == "kept"
        assert abs(model.depth - twin.depth) < 25
    assert [region.status for region in report.regions] == ["solve"], str(report)
    assert report.graphs == 1
    close(value_and_grads(run, model, x), value_and_grads(twin, twin, x), 1e-4)


def test_numbers_of_the_last_iteration() -> None:
    torch.manual_seed(0)
    model = TraceKept()
    run, report = compiled(model, tol=None)
    run(torch.randn(4, 16))
    (last,) = model.trace
    assert isinstance(last, float)
    assert last < 1e-6
    assert isinstance(model.info["absolute"], float)
    assert isinstance(model.depth, int)
    (region,) = report.regions
    assert any("holds the last iteration's numbers" in note for note in region.notes)


def test_a_counter_in_the_state() -> None:
    """It comes to what it comes to in eager mode, and is no part of the state that is solved for."""
    torch.manual_seed(0)
    model = CounterInTheState()
    run, report = compiled(model)
    run(torch.randn(4, 16))
    (region,) = report.regions
    assert region.status == "solve"
    assert len(region.states) == 1
    assert model.info["k"].dtype == torch.int32
    assert int(model.info["k"]) == 60
    assert float(model.info["r"].max()) < 1e-3


def test_a_meter_is_right() -> None:
    """Its sum is that of the counts, and each call counts once."""
    torch.manual_seed(0)
    model = MeterAfter()
    run, _ = compiled(model, tol=None, fullgraph=False)
    total = 0
    for _ in range(5):
        run(torch.randn(4, 16))
        total += model.depth
    assert model.meter.count == 5
    assert model.meter.sum == total


def test_a_count_in_a_dictionary_compiles_nothing_anew() -> None:
    torch.manual_seed(0)
    model = DictionaryAfter()
    run, report = compiled(model, tol=None, verify="first", fullgraph=False)  # this small a loop is given back to Dynamo
    for _ in range(30):
        run(torch.randn(4, 16))
    assert model.seen == {"calls": 30}
    assert model.depth == 30
    assert report.graphs == len(report.regions) == 1


def test_iterations_without_a_test_belong_to_the_loop() -> None:
    torch.manual_seed(0)
    run, report = compiled(LeastIterations(), tol=None)
    run(torch.randn(4, 16))
    (region,) = report.regions
    assert any("first 8 iterations" in note for note in region.notes), region.notes
    assert not report.skipped


@pytest.mark.parametrize("kind", LEFT_ALONE, ids=lambda kind: kind.__name__)
def test_left_alone(kind: type[Told]) -> None:
    torch.manual_seed(0)
    model = kind()
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=None, fullgraph=False)
    x = torch.randn(4, 16)
    close(value_and_grads(run, model, x), value_and_grads(twin, twin, x), 1e-5)
    assert not report.regions
    assert report.skipped


def test_a_loop_that_is_kept_tells_its_own_count() -> None:
    """Where the user's own loop runs, its own iterations are told."""

    class Slow(Told):
        def forward(self, x: Tensor) -> Tensor:
            z, k = torch.zeros_like(x), 0
            for k in range(12):  # noqa: B007
                new = self.f(z, x)
                done = (new - z).norm() < 1e-9
                z = new
                if done:
                    break
            self.depth = k + 1
            return z

    torch.manual_seed(0)
    model = Slow()
    run, report = compiled(model, tol=None)
    x = torch.randn(4, 16)
    torch.testing.assert_close(run(x), copy.deepcopy(model)(x))
    assert report.regions[0].status == "kept"
    assert model.depth == 12
