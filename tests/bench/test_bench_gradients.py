"""The gradient study: its references, its counts and its tables, on a body that is not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.gradients import report, study, tasks
from bench.gradients.bodies import CLASSES, MLP, RECIPES
from bench.gradients.modes import DEFAULT, MODES
from bench.gradients.train import Trained


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    module, head = MLP(), nn.Linear(64, CLASSES)
    x, y = torch.rand(1600, 64), torch.randint(0, CLASSES, (1600,))
    monkeypatch.setattr(study, "train", lambda body, seed, weights: Trained(body, seed, module, head, x, y, 64))
    return study.rows("mlp", 0, 1e-5, Path("unused"), list(MODES))


def test_quality_rows(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    by_mode = {row["mode"]: row for row in rows}
    assert set(by_mode) == set(MODES)
    assert DEFAULT in MODES
    exact = by_mode["exact"]
    assert exact["samples"] == study.SAMPLES
    assert exact["error"] < 1e-3  # what the forward tolerance leaves
    assert exact["error_here"] < 1e-5
    assert exact["cosine"] > 0.99999
    assert 0 < exact["radius"] < 1
    errors = [by_mode[f"reuse-{n}"]["error_here"] for n in (1, 2, 3, 5)]
    assert errors == sorted(errors, reverse=True)
    assert [by_mode[mode]["products"] for mode in ("jfb", "raw", "reuse-1", "reuse-3", "phantom-5")] == [1, 1, 1, 3, 5]
    for tol in ("1e-1", "1e-2", "1e-3"):
        assert by_mode[f"reuse<{tol}"]["residual"] <= float(tol)
    training = [
        {"task": "corner", "mode": mode, "seed": seed, "accuracy": 0.5 + 0.1 * seed, "seconds": 2.0, "backward_seconds": 1.0,
         "products": 3.0, "iterations": 10.0, "converged": 1.0}
        for mode in ("jfb", "exact") for seed in (0, 1)
    ]  # fmt: skip
    quality = [{**row, "tol": tol} for row in rows for tol in (1e-3, 1e-4)]
    found = {"date": "2026-01-01", "commit": "abc", "torch": "2", "quality": quality, "training": training}
    report.present(found, tmp_path / "plot.png")
    out = capsys.readouterr().out
    assert "0.550 ± 0.071" in out
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", RECIPES)
def test_every_body_maps_its_state_to_itself(name: str) -> None:
    recipe = RECIPES[name]
    z, x = torch.zeros(2, recipe.width), recipe.inputs(torch.rand(2, 64))
    assert recipe.make()(z, x).shape == z.shape


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_training_runs(task: str) -> None:
    outcome = tasks.train(task, "reuse<1e-1", 0, steps=2)
    assert 0 <= outcome.accuracy <= 1
    assert outcome.products >= 1


def test_recall_has_one_answer() -> None:
    tokens, values = tasks.Recall().draw(50)
    for row, value in zip(tokens.tolist(), values.tolist(), strict=True):
        pairs = {key: token - tasks.Recall.symbols for key, token in zip(row[:-1:2], row[1::2], strict=True)}
        assert pairs[row[-1]] == value
