"""A training that is watched learns, and its rows tell every step."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.examples.loading import example

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_rows_of_all_steps_and_a_picture(tmp_path: Path) -> None:
    path, picture = tmp_path / "solves.csv", tmp_path / "solves.png"
    accuracy = example("watch_training").main(steps=62, csv=path, plot=picture, every=5, options={"inner": "eager"})
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert accuracy > 0.85
    assert [int(row["step"]) for row in rows] == [*range(5, 61, 5), 62]  # the last two steps are not lost
    assert sum(int(row["solves"]) for row in rows) == 62  # the evaluation afterwards is no step
    assert len({row["region"] for row in rows}) == 1
    assert rows[0]["region"].startswith("watch_training.py:")
    assert all(0 < float(row["residual"]) <= 1e-4 for row in rows if row["verdict"] == "solve")
    assert all(float(row["vjps"]) >= 1 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
