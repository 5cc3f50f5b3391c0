"""A loop that is kept for good costs what it costs without us: its graph is compiled as the user wrote it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import as_written, record_solves
from tests.helpers import compiled, largest_error, reference, value_and_grads


class Slow(nn.Module):
    """Far from its fixed point after 12 iterations; `rate` 1 makes it contract at once."""

    def __init__(self, rate: float = 0.02) -> None:
        super().__init__()
        self.U = nn.Linear(8, 8)
        self.register_buffer("rate", torch.tensor(rate))

    def forward(self, x: Tensor) -> Tensor:
        w, z = torch.tanh(self.U(x)), torch.zeros_like(x)
        for _ in range(12):
            z = z + self.rate * (w + 0.1 * torch.sin(z) - z)
        return z


class StartAlone(nn.Module):
    """What needs a gradient reaches the loop through its initial state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.U = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.U(x)
        for _ in range(12):
            z = 0.5 * (z + z.roll(1, 1))
        return z


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which graph each call ran."""
    seen: list[str] = []
    original = as_written.turning

    def spied(rewritten: Any, sites: Any, written: Any, compile_graph: Any) -> Any:
        def noted(*args: Any) -> Any:
            seen.append("rewritten")
            return rewritten(*args)

        def compiling(graph: Any, inputs: Any) -> Any:
            seen.append("compiles")
            plain = compile_graph(graph, inputs)

            def run(*args: Any) -> Any:
                seen.append("written")
                return plain(*args)

            return run

        return original(noted, sites, written, compiling)

    monkeypatch.setattr("deq_compile.backend.turning", spied)
    return seen


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_after_three_comparisons_the_graph_is_compiled_as_written(turns: list[str], inner: str) -> None:
    torch.manual_seed(0)
    model, x = Slow(), torch.randn(4, 8)
    right = reference(model, x)
    run, report = compiled(model, inner=inner)
    for _ in range(18):
        assert largest_error(value_and_grads(run, model, x), right) < 1e-5
    rewritten, written = ["rewritten"], ["written"]
    assert (
        turns == rewritten * 3 + ["compiles", "written"] + rewritten + written * 3 + rewritten + written * 7 + rewritten + written
    )
    assert [region.status for region in report.regions] == ["kept"]


def test_a_loop_that_begins_to_converge_is_solved_again(turns: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Slow(), torch.randn(4, 8)
    run, report = compiled(model)
    for _ in range(6):
        value_and_grads(run, model, x)
    assert turns[-1] == "written"
    with torch.no_grad():
        model.rate.fill_(0.95)
    right = reference(model, x)
    for _ in range(4):  # the comparison is at the eighth
        assert largest_error(value_and_grads(run, model, x), right) < 1e-4
    assert report.regions[0].status == "solve"
    assert turns[-2:] == ["rewritten"] * 2


def test_who_records_sees_the_region(turns: list[str]) -> None:
    model, x = Slow(), torch.randn(4, 8)
    run, _ = compiled(model)
    for _ in range(5):
        run(x)
    with record_solves() as solves:
        run(x)
    assert turns[-1] == "rewritten"
    assert [(solve.status, solve.iterations) for solve in solves] == [("kept", 12)]


@pytest.mark.parametrize("change", [{"loop_memory": 3}, {"verify": "never"}])
def test_options_that_want_the_region(turns: list[str], change: dict[str, Any]) -> None:
    model, x = Slow(), torch.randn(4, 8)
    run, _ = compiled(model, **change)
    for _ in range(5):
        run(x)
    assert set(turns) == {"rewritten"}


def test_sizes_that_change_stay_with_the_region(turns: list[str]) -> None:
    torch.manual_seed(0)
    model = Slow()
    run, _ = compiled(model, dynamic=True)
    for rows in (4, 5, 6, 7, 8, 9):
        x = torch.randn(rows, 8)
        assert largest_error(value_and_grads(run, model, x), reference(model, x)) < 1e-5
    assert set(turns) == {"rewritten"}


def test_a_backend_that_fails_leaves_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(as_written.Written, "module", failing)
    monkeypatch.delenv("DEQ_COMPILE_RAISE")
    torch.manual_seed(0)
    model, x = Slow(), torch.randn(4, 8)
    run, _ = compiled(model)
    right = reference(model, x)
    for _ in range(3):
        value_and_grads(run, model, x)
    with pytest.warns(RuntimeWarning, match="as it was written"):
        value_and_grads(run, model, x)
    assert largest_error(value_and_grads(run, model, x), right) < 1e-5


def test_a_loop_that_is_kept_from_the_start_stays_in_the_graph() -> None:
    torch.manual_seed(0)
    model, x = StartAlone(), torch.randn(8, 8)
    right = reference(model, x)
    run, report = compiled(model)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert largest_error(found, right) < 1e-5
    assert [(region.status, region.iterations) for region in report.regions] == [("kept", 12)]
    assert "initial state alone needs a gradient" in str(report)
    assert solves == []  # the loop is the inner backend's
    run, report = compiled(StartAlone(), loop_memory=3)
    with record_solves() as solves:
        run(x)
    assert len(solves) == 1
