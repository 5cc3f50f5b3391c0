"""`python -m bench gpu`: a rehearsal as a user would start it; plan, store, conducting, compiling ahead, report and goals."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import cli, compile_ahead, conduct, goals, plan, readme, report, ways
from bench.gpu.common import Setting
from bench.gpu.store import Results, Store, bad, label, merged

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.thorough
def test_a_dry_run(tmp_path: Path) -> None:
    """Every part runs without a device, all checks pass, and both directions of a compiled model run as WHILE graphs."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "checks passed" in done.stdout
    results = merged([Store(tmp_path / "gpu-dry-run.json").read()])
    assert results.facts["torch"] == torch.__version__
    assert results.failed == []
    assert {label(r) for r in results.rows} >= {g.label for g in plan.rehearsed()}
    checked = [row for row in results.rows if "ok" in row]
    assert len(checked) >= 30
    assert all(row["ok"] for row in checked)
    assert not [row for row in results.rows if "failed" in row]  # neither a peer nor compiling ahead
    (whole,) = [r for r in results.rows if r["what"] == "one compiled model" and r["engine"] == "while"]
    assert (whole["forward"], whole["adjoint"]) == (["while"], ["while"])
    assert [r["task"] for r in results.rows if r["what"] == "compiled ahead"]
    assert goals.table(results).count("not measured") == len(goals.GOALS)
    assert readme.table(results) == "Training steps on a GPU: not measured."


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m bench gpu`, in this process: a SystemExit with a text goes to stderr, and its status is 1."""
    monkeypatch.setattr(cli, "device_seen", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu"])
    monkeypatch.delitem(sys.modules, "bench.__main__", raising=False)  # another test may have looked into it
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("bench", run_name="__main__", alter_sys=True)
    assert isinstance(stopped.value.code, str)
    assert "expected a CUDA device, found none. Fix: run it where there is one, or add --dry-run" in stopped.value.code


def test_two_calls_hold_everything() -> None:
    """Each call fits into ten minutes with the wait for compiling; together they are the plan; what decides comes first."""
    for call in (1, 2):
        groups = plan.of_call(call)
        beside = sum(g.seconds for g in groups if g.part in plan.BESIDE_COMPILING)
        rest = sum(g.seconds for g in groups if g.part not in plan.BESIDE_COMPILING)
        assert max(beside, plan.COMPILING[call]) + rest <= plan.CALL_SECONDS  # the rest waits for the compiling
        assert groups[0].part == "facts"
    assert {g.label for call in (1, 2) for g in plan.of_call(call)} == {g.label for g in plan.PLAN}
    order = list(dict.fromkeys(g.part for g in plan.PLAN))
    assert order == ["facts", "first", "probe", "correct", "experiments", "kernels", "steps"]
    assert plan.CALL_SECONDS < 600


def test_parts_and_seconds_on_the_command_line() -> None:
    first, *probes, lm = plan.chosen("first=60,probe=90,steps.lm", 0)
    assert (first.label, first.seconds) == ("first", 60)
    assert [g.label for g in probes] == ["probe.condition", "probe.engines", "probe.race", "probe.failures"]
    assert sum(g.seconds for g in probes) == pytest.approx(90)
    planned = {g.label: g.seconds for g in plan.PLAN}
    assert probes[0].seconds / probes[1].seconds == pytest.approx(planned["probe.condition"] / planned["probe.engines"])
    assert lm.seconds == planned["steps.lm"]
    with pytest.raises(SystemExit, match=r"expected some of facts, first, .*got 'nonsense'"):
        plan.chosen("nonsense", 0)
    for seconds in ("0", "-1", "soon"):
        with pytest.raises(SystemExit, match="expected seconds above 0 for first"):
            plan.chosen(f"first={seconds}", 0)


def test_environment_is_set_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    real, dry = cli.environment(dry=False), cli.environment(dry=True)
    assert int(real["TORCHINDUCTOR_COMPILE_THREADS"]) >= 1
    assert "TRITON_INTERPRET" not in real  # a device is there: nothing is interpreted
    assert dry["TRITON_INTERPRET"] == "1"
    assert real["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


WRITER = "import sys, time; sys.path.insert(0, {root!r}); from pathlib import Path; from bench.gpu.store import Store\n"


def test_processes_that_write_at_once_lose_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    code = (
        WRITER.format(root=str(ROOT)) + f"[Store(Path({str(file)!r})).add({{'writer': sys.argv[1], 'i': i}}) for i in range(40)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(w)]) for w in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    rows = Store(file).read()["rows"]
    assert sorted((r["writer"], r["i"]) for r in rows) == [(str(w), i) for w in range(3) for i in range(40)]


@pytest.fixture
def call(tmp_path: Path) -> conduct.Call:
    args = Namespace(out=tmp_path, dry_run=False, call=1)
    return conduct.Call(
        args, [plan.Group("first", "", 3, 1), plan.Group("probe", "race", 20, 1), plan.Group("steps", "lm", 20, 2)]
    )


def test_a_group_that_hangs_or_crashes_costs_only_itself(call: conduct.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows stay, how it ended is told, and the next one runs."""
    row = "Store(Path({file!r})).add({{'run': 0, 'part': {part!r}, 'group': {group!r}, 'what': 'found', 'ok': True}})\n"
    ends = {"first": "time.sleep(600)", "probe.race": "import os; os.abort()", "steps.lm": "pass"}

    def start(child: str, until: float, share: str = "") -> subprocess.Popen[bytes]:
        part, _, group = child.partition(".")
        code = WRITER.format(root=str(ROOT)) + "import os; os.setpgrp()\n"
        code += row.format(file=str(call.store.file), part=part, group=group) + ends[child]
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    monkeypatch.setattr(call, "start", start)
    monkeypatch.setattr(call, "compile_ahead", list)
    monkeypatch.setattr(conduct, "GRACE", 0.5)
    begun = time.monotonic()
    call.conduct()
    assert time.monotonic() - begun < 20
    results = merged([call.store.read()])
    assert {label(r) for r in results.rows if r["what"] == "found"} == {"first", "probe.race", "steps.lm"}
    assert results.failed == ["first: stopped at its limit", "probe.race: exit status -6"]


def test_a_call_ends_in_time(call: conduct.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time used up, groups are not begun, and each says so."""
    call.until = time.time() + 5
    monkeypatch.setattr(call, "compile_ahead", list)
    call.conduct()
    assert [r["outcome"] for r in call.store.read()["rows"]] == ["not begun: the call's time is up"] * 3


def test_timed_groups_wait_for_the_compilers(call: conduct.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed does not share the machine with compiling; one that hangs is stopped."""
    order: list[str] = []
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(call, "compile_ahead", lambda: [compiler])
    monkeypatch.setattr(call, "one", lambda group: order.append(f"{group.label} {compiler.poll()}"))
    monkeypatch.setitem(conduct.COMPILING, 1, 0.5)
    monkeypatch.setattr(conduct, "GRACE", 0.5)
    call.conduct()
    assert order == ["first None", "probe.race -9", "steps.lm -9"]
    assert [r["outcome"] for r in call.store.read()["rows"]] == ["stopped at its limit"]


def test_tasks_compiled_ahead_cover_what_is_timed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = compile_ahead.tasks({g.label for g in plan.PLAN}, dry=False)
    names = [t.name for t in found]
    assert len(names) == len(set(names))
    assert [t.weight for t in found] == sorted((t.weight for t in found), reverse=True)
    for group in plan.PLAN:
        if group.part not in ("facts", "first", "probe"):
            assert any(name.startswith(group.label) for name in names), group.label


def test_a_task_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def fail(setting: Setting) -> None:
        setting.row("nobody sees this", ok=False)
        raise RuntimeError("no")

    tasks = [compile_ahead.Task("bad", 2, fail), compile_ahead.Task("good", 1, lambda s: ran.append("good"))]
    monkeypatch.setattr(compile_ahead, "tasks", lambda labels, dry: tasks)
    setting = Setting("compile", "", Store(tmp_path / "rows.json"), True, time.time() + 60)
    compile_ahead.run_share(setting, set(), "0/1")
    rows = setting.store.read()["rows"]
    assert [(r["task"], r.get("failed")) for r in rows] == [("bad", "RuntimeError: no"), ("good", None)]
    assert ran == ["good"]
    assert not any(bad(r) for r in rows)


def test_probes_have_predictions_and_a_raising_one_becomes_a_row(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from bench.gpu import probes
    from bench.gpu.probes.registry import Finding, Probe

    assert set(probes.GROUPS) == {g.name for g in plan.PLAN if g.part == "probe"}
    for group in probes.GROUPS:
        assert probes.of_group(group)
        assert all(p.predicted for p in probes.of_group(group))

    def raising(setting: Setting) -> Finding:
        raise RuntimeError("refused")

    setting = Setting("probe", "x", Store(tmp_path / "rows.json"), True, time.time() + 60)
    probes.ask(setting, Probe("x", "raises", "works", False, raising))
    probes.ask(setting, Probe("x", "fails", "works", False, lambda s: Finding(False, {"n": 3})))
    probes.ask(setting, Probe("x", "skips", "works", True, raising))
    raised, failed, skipped = setting.store.read()["rows"]
    assert "RuntimeError: refused" in raised["error"]
    assert (failed["ok"], failed["n"], failed["predicted"]) == (False, 3, "works")
    assert "ok" not in skipped
    assert [bad(r) for r in (raised, failed, skipped)] == [True, True, False]


# Results


def content(rows: Sequence[dict[str, Any]], device: str = "card", runs: int = 1) -> dict[str, Any]:
    facts = [{"run": i, "part": "facts", "what": "device", "device": device, "torch": "2", "date": "today"} for i in range(runs)]
    return {"runs": [{}] * runs, "rows": [*facts, *({"part": "steps", "group": "", **row} for row in rows)]}


def test_a_group_that_ran_again_replaces_its_rows_and_devices_do_not_mix() -> None:
    old = content([{"run": 0, "group": "lm", "what": "step", "ms": 2}, {"run": 0, "group": "conv", "what": "step", "ms": 3}])
    new = content([{"run": 0, "group": "lm", "what": "step", "ms": 1}])
    other = content([{"run": 0, "group": group, "what": "step", "ms": 9} for group in ("lm", "flow")], device="other card")
    results = merged([other, old, new])
    assert sorted((r["group"], r["ms"]) for r in results.rows if r["what"] == "step") == [("conv", 3), ("lm", 1)]
    assert results.others == ["other card"]
    assert merged([old, new, other]).facts["device"] == "other card"


def test_what_is_wrong_comes_first_and_decides() -> None:
    rows = [
        {"part": "correct", "group": "", "what": "kernels", "ok": True},
        {"part": "correct", "group": "", "what": "model", "ok": False, "model": "conv"},
        {"part": "steps", "group": "lm", "what": "step", "error": "RuntimeError: no"},
        {"part": "steps", "group": "lm", "what": "step", "problem": "lm", "way": "JAX", "failed": "a peer's own trouble"},
        {"part": "steps", "group": "lm", "what": "outcome", "outcome": "stopped at its limit"},
    ]
    assert [bad(row) for row in rows] == [False, True, True, False, False]
    text = report.table(Results({}, rows, []))
    assert "1 of 2 checks passed" in text
    assert "WRONG correct / model: {'model': 'conv'}" in text
    assert "GROUP FAILED steps.lm: stopped at its limit" in text
    assert text.startswith("no device has been measured")


def measured(ours: float) -> list[dict[str, Any]]:
    """Rows of a device on which all figures of ours are `ours` times what the goals ask for; above 1 is better."""

    def step(problem: str, way: str, ms: float, error: float = 1e-3, **more: Any) -> dict[str, Any]:
        return {"what": "step", "problem": problem, "way": way, "ms": ms, "value_error": 0.0, "gradient_error": error, **more}

    good = ours >= 1
    rows = [
        {
            "what": "one compiled model", "engine": "while", "ok": True, "forward": ["while"],
            "adjoint": ["while" if good else "loop"],
        },
        {"what": "9: a forward that asks the device nothing", "ok": True},
        {
            "what": "3, 4, 7: a solve", "engine": "while", "B": 128, "D": 1024, "iterations": 10, "launches": 2 if good else 3,
            "us_per_iteration_beyond_body": 10 / ours,
        },
        step("mlp128", ways.PEER, 10.0), step("mlp128", ways.OURS, 1 / ours, ok=True),
        step("mdeq", ways.PEER, 3.0), step("mdeq", ways.OURS, 1 / ours, ok=True),
        step("lm", ways.INDUCTOR, 2.0), step("lm", ways.OURS, 1 / ours, ok=True), step("lm", ways.RAW, 0.1, error=0.5, ok=True),
        step("mdeq", ways.FULL, 9.0, ms_backward=13.0), step("mdeq", ways.RAW, 1.0, ms_backward=1 / ours),
    ]  # fmt: skip
    for shape, n, MB in (("small", 30, 1), ("large", 30, 300), ("larger", 30, 600), ("larger", 10, 200)):
        share = 0.85 * ours if n == 30 else 0.1
        rows.append(
            {"part": "kernels", "what": "step", "factors": "float32", "shape": shape, "n": n, "MB": MB, "share_of_copy": share}
        )
    return [{"run": 0, "part": "steps", "group": "", **row} for row in rows]


@pytest.mark.parametrize(("ours", "outcome"), [(1.02, True), (0.98, False)])
def test_goals_are_met_or_missed_by_the_figures(ours: float, outcome: bool) -> None:
    results = merged([content(measured(ours))])
    for goal in goals.GOALS:
        found = goal.measure(results)
        assert found is not None, goal.name
        assert found.met is outcome, (goal.name, found)
    assert ("missed" in goals.table(results)) is not outcome


def test_a_rehearsal_meets_no_goal() -> None:
    """Its rows look like a device's; its clock is the interpreter's."""
    rows = content(measured(1.0))
    rows["rows"][0]["rehearsed"] = True
    assert goals.table(merged([rows])).count("not measured") == len(goals.GOALS)
    assert readme.table(merged([rows])) == "Training steps on a GPU: not measured."


def test_nothing_is_said_of_what_was_not_measured() -> None:
    empty = merged([])
    assert [goal.measure(empty) for goal in goals.GOALS] == [None] * len(goals.GOALS)
    assert goals.table(empty).count("not measured") == len(goals.GOALS)
    assert readme.table(empty) == "Training steps on a GPU: not measured."
    text = readme.table(merged([content(measured(1.0))]))
    mlp128 = next(line for line in text.splitlines() if "128 × 128" in line)
    assert [cell.strip() for cell in mlp128.split("|")[2:5]] == ["not measured", "not measured", "10"]
    assert "card, torch 2, today" in text


def test_goals_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content(measured(1.0))))
    assert conduct.show_goals([tmp_path / "a.json"]) == 0
    assert capsys.readouterr().out.count(" met") == len(goals.GOALS)
    with pytest.raises(SystemExit, match="found no such file"):
        conduct.show_readme([tmp_path / "b.json"])
