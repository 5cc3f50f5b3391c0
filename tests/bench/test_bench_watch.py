"""What watching costs: both kinds of steps are timed, the file is written, and the solves were solves."""

from __future__ import annotations

import json
from pathlib import Path

from bench.__main__ import main


def test_plain_and_watched_steps_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "watch.json"
    assert main(["watch", "--widths", "32", "--batch", "16", "--turns", "3", "--inner", "eager", "--json", str(path)]) == 0
    stored = json.loads(path.read_text())
    (row,) = stored["rows"]
    assert row["verdicts"] == ["solve"]
    assert 0 < row["iterations"] < 40
    assert row["plain_ms"] > 0 < row["watched_ms"]
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert stored["machine"]["threads"] == 1
