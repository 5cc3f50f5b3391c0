"""The logger: what its rows say, that it changes nothing, and that nothing is lost."""

from __future__ import annotations

import contextlib
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import SolveRecord, fixed_point, record_solves
from deq_compile.backend import Backend
from deq_compile.region.records import recording
from deq_compile.watch import COLUMNS, CSVSink, SolveLogger, TensorBoardSink, WandbSink, rows_of
from tests.fresh import python


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        nn.init.orthogonal_(self.cell.weight, gain=0.7)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = torch.tanh(self.cell(z) + x)
        return self.head(z)


def trained(after_step: Callable[[], Any], steps: int = 5) -> list[Tensor]:
    """Losses and weights of a short training."""
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = Model()
    run = torch.compile(model, backend="deq", options={"inner": "eager"})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(torch.randn(8, 16)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        after_step()
    return [*losses, *(p.detach() for p in model.parameters())]


def solve(scale: float = 0.5) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    fixed_point(lambda z: torch.tanh(scale * z + x), torch.zeros(2, 3)).sum().backward()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_rows_are_what_the_records_say() -> None:
    rows: list[dict[str, Any]] = []
    with record_solves() as solves, SolveLogger(rows.append, every=2) as log:
        trained(log.step)
    assert [(row["step"], row["steps"]) for row in rows] == [(2, 2), (4, 2), (5, 1)]  # the rest is written at the end
    assert {row["verdict"] for row in rows} == {"solve"}
    assert rows[0]["region"].startswith("test_logger.py:")
    assert len(solves) == 5
    for row, (first, *others) in zip(rows, (solves[:2], solves[2:4], solves[4:]), strict=True):
        both = [first, *others]
        assert row["key"] == first.region
        assert row["solves"] == len(both)
        assert row["iterations"] == pytest.approx(sum(r.iterations for r in both) / len(both))
        assert row["vjps"] == pytest.approx(sum(r.vjps or 0 for r in both) / len(both))
        assert row["residual"] == max(r.residual for r in both)
        assert row["adjoint_residual"] == max(r.adjoint_residual or 0 for r in both) > 0
        assert row["adjoint_error"] is not None
        assert row["gradient_error"] == both[-1].gradient_error


def test_a_watched_training_is_the_same_training() -> None:
    plain = trained(lambda: None)
    with SolveLogger(lambda row: None) as log:
        watched = trained(log.step)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_watching_compiles_nothing_again() -> None:
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return Backend({"inner": "eager"})(graph, inputs)

    model = torch.compile(Model(), backend=counted, fullgraph=True)
    model(torch.ones(2, 16)).sum().backward()
    with SolveLogger(lambda row: None) as log:
        model(torch.ones(2, 16)).sum().backward()
        log.step()
    assert len(graphs) == 1


def test_a_kept_loop_has_no_residual() -> None:
    kept = SolveRecord("a", "kept", iterations=30.0, iterations_max=30, vjps=30, where="/m/model.py:3")
    (row,) = rows_of([kept])
    assert (row["verdict"], row["kept"], row["residual"], row["converged"]) == ("kept", 1.0, None, None)
    assert (row["iterations"], row["vjps"]) == (30.0, 30.0)
    (row,) = rows_of([kept, SolveRecord("a", "solve", residual=0.25, converged=0.5, where="/m/model.py:3")])
    assert (row["residual"], row["converged"], row["kept"]) == (0.25, 0.5, 0.5)


def test_regions_have_names_of_their_own() -> None:
    records = [SolveRecord(key, "solve", where=where) for key, where in (("a", "x/model.py:3"), ("b", "x/model.py:3"), ("c", ""))]
    assert [row["region"] for row in rows_of(records)] == ["model.py:3", "model.py:3 (2)", "c"]


def test_a_residual_that_is_no_number_is_seen() -> None:
    records = [SolveRecord("a", "solve", residual=value) for value in (1.0, math.nan, 2.0)]
    assert math.isnan(rows_of(records)[0]["residual"])


def test_what_runs_in_a_pause_is_not_counted() -> None:
    rows: list[dict[str, Any]] = []
    with SolveLogger(rows.append) as log:
        solve()
        log.pause()
        solve()
        log.pause()  # twice is once
        log.resume()
        solve()
        log.step(7)
        solve()  # of a step that does not end
    assert [(row["step"], row["solves"]) for row in rows] == [(7, 2)]


def test_a_sample_is_the_last_of_every_few_steps() -> None:
    rows: list[dict[str, Any]] = []
    seen: list[bool] = []
    with SolveLogger(rows.append, every=3, sample=True) as log:
        for _ in range(7):
            seen.append(recording())
            log.pause()  # for an evaluation
            solve()
            log.resume()
            solve()
            log.step()
    assert seen == [False, False, True] * 2 + [False]
    assert [(row["step"], row["steps"], row["solves"]) for row in rows] == [(3, 3, 1), (6, 3, 1)]
    assert not recording()


def test_a_file_is_complete_after_every_step_and_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "solves.csv"
    with contextlib.suppress(KeyboardInterrupt), SolveLogger(path, every=2) as log:
        for number in (1, 2, 3):
            solve()
            log.step(number)
            assert len(read(path)) == number // 2
        raise KeyboardInterrupt
    assert [row["step"] for row in read(path)] == ["2", "3"]
    path.write_text(path.read_text() + "4,1,half")  # a line that did not become whole
    with SolveLogger(path) as log:
        solve()
        log.step(5)
    assert [row["step"] for row in read(path)] == ["2", "3", "4", "5"]
    assert path.read_text().count(",".join(COLUMNS)) == 1
    CSVSink(path, replace=True).close()
    assert read(path) == []


def test_a_process_that_is_killed_leaves_its_rows(tmp_path: Path) -> None:
    code = f"""
import os, torch
from deq_compile import fixed_point
from deq_compile.region.records import recording
from deq_compile.watch import SolveLogger
log = SolveLogger({str(tmp_path / "solves.csv")!r}).start()
for _ in range(3):
    fixed_point(lambda z: torch.tanh(0.5 * z + 1), torch.zeros(2, 3))
    log.step()
os._exit(9)
"""
    done = python(code, "torch")
    assert done.returncode == 9
    assert [row["step"] for row in read(tmp_path / "solves.csv")] == ["1", "2", "3"]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected every to be a positive integer, got 0"):
        SolveLogger(every=0)
    with pytest.raises(TypeError, match="expected sinks to be paths of CSV files or callables"):
        SolveLogger(3)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n")
    with pytest.raises(ValueError, match=r"got a file that does not. Fix: another path, or CSVSink\(path, replace=True\)"):
        SolveLogger(other)


class Board:
    """What both a SummaryWriter and a wandb run would be told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def flush(self) -> None: ...

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.told.append((name, step_metric))

    def log(self, numbers: dict[str, float]) -> None:
        self.told.append(numbers)


def test_boards_are_told_numbers() -> None:
    board, run = Board(), Board()
    with SolveLogger(TensorBoardSink(board), WandbSink(run, prefix="mine")) as log:
        solve()
        log.step(4)
    scalars = {name.rsplit("/", 1)[1]: (value, step) for name, value, step in board.told}
    assert {"iterations", "residual", "vjps", "converged", "solve"} <= set(scalars)
    assert not set(scalars) & {"region", "key", "verdict", "step"}
    assert all(isinstance(value, float) and step == 4 for value, step in scalars.values())
    assert run.told[:2] == [("mine/step", None), ("mine/*", "mine/step")]
    assert run.told[2]["mine/step"] == 4
    assert len(run.told[2]) == 1 + len(scalars)


def test_tensorboard_writes_a_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with SolveLogger(TensorBoardSink(str(tmp_path))) as log:
        solve()
        log.step()
    (file,) = tmp_path.iterdir()
    assert b"adjoint_residual" in file.read_bytes()


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"WandbSink: expected wandb to be importable, got .* Fix: pip install wandb"):
        WandbSink()


def test_nothing_is_loaded_before_it_is_needed() -> None:
    dear = ("matplotlib", "tensorboard", "wandb", "lightning", "transformers", "torch._dynamo")
    code = f"""
import sys, deq_compile
print("deq_compile.watch" in sys.modules)
import deq_compile.watch
print([name for name in {dear} if name in sys.modules])
"""
    done = python(code, "torch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "[]"]
