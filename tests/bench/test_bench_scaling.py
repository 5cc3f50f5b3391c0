"""``python -m bench scaling``: a small run of it in this process, interrupted and resumed, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench import problems
from bench.scaling import cli, outputs
from bench.scaling.points import AXES, Point, Sweeps, sweeps
from bench.tables import cases, runs

LABELS = {"eager": "eager loop", "deq": "deq, default"}
PLAN: Sweeps = {"N": [Point(8, 2, 5), Point(8, 2, 9)], "memory": [Point(8, 2, 5)]}


def row(point: Point, method: str, step: float, residual: float = 1e-5) -> dict[str, Any]:
    found = {"problem": point.name, "inject": "before", "method": method, "cpu": {"step_ms": step}}
    return found | {"gradient_error": 1e-3, "residual": residual, "iterations": 5, "vjps": 2, "status": "solve"}


def test_names_are_sizes() -> None:
    assert Point.parse(Point(16, 4, 30).name) == Point(16, 4, 30)
    with pytest.raises(ValueError, match="mlp-D256-B32-N30, got 'conv'"):
        Point.parse("conv")
    for quick in (True, False):
        assert list(sweeps(quick)) == list(AXES)


def test_a_point_in_two_sweeps_is_measured_once() -> None:
    shared = Point(8, 2, 5)
    found = cli.tasks({"D": [shared], "N": [shared], "memory": [shared]}, ["eager", "deq"])
    assert [(task["kind"], task.get("method")) for task in found] == [("timing", None), ("memory", "eager"), ("memory", "deq")]


def test_a_table_has_ratios_to_ours_marks_and_gaps() -> None:
    short, long = PLAN["N"]
    rows = [row(short, "eager", 10.0, residual=1e-2), row(short, "deq", 5.0), row(long, "eager", 20.0)]
    rows.append({"problem": long.name, "inject": "before", "method": "deq", "skipped": "failed: no compiler"})
    text = outputs.text_tables(rows, PLAN, LABELS, "cpu")
    first, second = text.splitlines()[3:5]
    assert first.split() == ["5", "10.00", "†", "5.00", "5", "2", "solve", "2.00×"]
    assert second.split() == ["9", "20.00", "–", "–", "–", "–", "–"]
    assert text.splitlines()[-1] == "deq, default: failed: no compiler"


def test_an_interrupted_run_keeps_its_points_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(problems, "PROBLEMS", dict(problems.PROBLEMS))
    monkeypatch.setattr(cases, "ITERATIONS", dict(cases.ITERATIONS))
    monkeypatch.setattr(cli, "sweeps", lambda quick: PLAN)
    stop_at = Point(8, 2, 9).name
    done: list[str] = []

    def run_here(args: argparse.Namespace, task: dict[str, Any], command: str, cache: str) -> None:
        if task["problem"] == stop_at:
            raise KeyboardInterrupt
        done.append(f"{task['kind']} {task['problem']}")
        assert cli.main(argparse.Namespace(**vars(args) | {"child": json.dumps(task)})) == 0

    monkeypatch.setattr(runs, "run_task", run_here)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    stored = tmp_path / "a.json"
    common = ["--methods", "eager", "--repeats", "1", "--out", str(tmp_path / "out"), "--json", str(stored)]
    assert cli.main(parser.parse_args(common)) == 130
    assert [r["problem"] for r in json.loads(stored.read_text())["rows"]] == [Point(8, 2, 5).name]
    stop_at = ""
    assert cli.main(parser.parse_args([*common, "--resume"])) == 0
    assert done == [f"timing {Point(8, 2, 5).name}", f"timing {Point(8, 2, 9).name}", f"memory {Point(8, 2, 5).name}"]
    capsys.readouterr()
    picture = tmp_path / "a.png"
    assert cli.main(parser.parse_args(["--show", str(stored), "--plot", str(picture)])) == 0
    assert "peak MB of a step against the iterations of the loop N; D = 8, B = 2" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
