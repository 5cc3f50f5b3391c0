"""``python -m bench against``: a commit's package is put apart, and both train on the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import against
from bench.__main__ import main
from bench.tables.runs import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository of git's")


def test_a_commits_package_is_whole_and_has_no_benchmarks(tmp_path: Path) -> None:
    name = against.unpack("HEAD", tmp_path)
    assert len(name) == 40
    assert (tmp_path / "deq_compile" / "kernels" / "native.py").exists(), "links are links"
    assert not (tmp_path / "bench").exists(), "those of today are used"


def test_an_unknown_commit_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a commit of this repository, got 'nowhere'"):
        against.unpack("nowhere", tmp_path)


def test_a_process_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "PROGRAM", "raise SystemExit(3)")
    with pytest.raises(SystemExit, match="ended with 3"):
        against.Lane(tmp_path, "mlp128", {}, "unused")


@pytest.mark.thorough
def test_a_row_of_one_problem(tmp_path: Path) -> None:
    path, options = tmp_path / "against.json", json.dumps({"inner": "eager"})
    command = ["against", "HEAD", "--problems", "mlp128", "--trained", "1", "--timed", "4", "--options", options]
    assert main([*command, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert len(found["before"]) == 40
    assert row["ms before"] > 0 < row["ms after"]
    assert row["gradient error before"] == pytest.approx(row["gradient error after"], rel=0.5)
    assert row["gradient error after"] < 0.1
