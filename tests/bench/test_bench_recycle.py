"""What recycling saves is counted on the same weights, batches and losses; whole steps are timed; finished rows are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.recycle import cli, steps, study, training, ways


def test_rows_are_counted_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUICK_STEPS", 4)
    monkeypatch.setattr(cli, "TOLERANCES", (1e-2,))
    path, picture = tmp_path / "new" / "recycle.json", tmp_path / "recycle.png"
    command = ["recycle", "--quick", "--parts", "training", "--bodies", "mlp", "--seeds", "1", "--json", str(path), "--resume"]
    assert main([*command, "--plot", str(picture)]) == 0
    (row,) = json.loads(path.read_text())["training"]
    assert row["steps"] == 4
    assert row["evaluations"] > 0 < row["products"]
    assert row["evaluations without"] > 0 < row["products without"]
    assert picture.stat().st_size > 10_000
    monkeypatch.setattr(training, "row", lambda **key: pytest.fail(f"run again: {key}"))
    assert main(command) == 0


def test_whole_steps_are_timed_with_both_values_of_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.OPTIONS, "inner", "eager")
    path = tmp_path / "steps.json"
    command = ["recycle", "--parts", "solver", "--problems", "mlp128", "--trained", "0", "--timed", "10", "--json", str(path)]
    assert main(command) == 0
    (row,) = json.loads(path.read_text())["solver"]
    assert row["ms broyden"] > 0 < row["ms auto"]
    assert row["uses"].startswith(("Broyden, less work", "plain iteration, less work"))
    assert max(row["gradient error broyden"], row["gradient error auto"]) < 0.1


def test_the_study_changes_one_constant_at_a_time_and_puts_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUICK_STEPS", 3)
    monkeypatch.setattr(study, "OTHERS", {"rank": (4,), "stored": ("bfloat16",)})
    before, path = [getattr(*where) for where in study.WHERE.values()], tmp_path / "study.json"
    assert main(["recycle", "--quick", "--parts", "study", "--bodies", "mlp", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["study"]
    assert [row["changed_to"] for row in rows] == ["", "rank=4", "stored=bfloat16"]
    assert [getattr(*where) for where in study.WHERE.values()] == before
    inside = []
    for name, value in study.changes():
        with study.changed(name, value):
            inside.append(
                [now is not usual for now, usual in zip((getattr(*w) for w in study.WHERE.values()), before, strict=True)]
            )
    assert [sum(was) for was in inside] == [0, 1, 1]
    assert study.table(rows)[0]["changed"] == "nothing"


def test_ways_are_compared_on_the_same_cotangents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUICK_STEPS", 3)
    monkeypatch.setattr(ways, "EVERY", 1)
    monkeypatch.setattr(ways, "FIRST", 1)
    path = tmp_path / "ways.json"
    assert main(["recycle", "--quick", "--parts", "ways", "--bodies", "mlp", "--seeds", "1", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["ways"]
    assert row["measured"] == 2
    assert set(row["products"]) == set(ways.WAYS)
    assert row["products"]["none"] == row["net"]["none"]
    assert all(row["products"][way] < row["net"][way] for way in ways.WAYS[1:])  # what a way costs is counted
    assert row["products"]["adjoints"] < row["products"]["none"] > row["products"]["M"]


def test_products_of_a_way_reach_the_tolerance() -> None:
    torch.manual_seed(0)
    J, q = 0.9 * torch.linalg.qr(torch.randn(24, 24))[0], torch.randn(3, 24)
    exact = torch.linalg.inv(torch.eye(24) - J)  # rows: w = q (I - J)^-1 solves w = q + w J
    assert ways.residuals(lambda w: w @ J, q, lambda r: r @ exact)[0] == 1
    plain, basis = ways.residuals(lambda w: w @ J, q, lambda r: r)
    assert 1 < plain < ways.MOST_PRODUCTS
    assert all(torch.allclose(p - p @ J, image, atol=1e-4) for p, image in basis)
