"""The logic of ``python -m bench tables``: what counts as converged, who is compared with whom, and what survives an
interruption; and one run of it, small, in this process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import problems
from bench.tables import cli, compile_time, jax_peers, measure, memory, outputs, report, runs
from bench.tables.bound import Bound
from bench.tables.cases import load
from bench.tables.methods import Deq, Method, Step, all_methods
from bench.tables.peers import TorchDEQ
from bench.tables.reference import reference, relative_error

Row = dict[str, Any]
KINDS = {key: method.kind for key, method in all_methods().items()}
LABELS = {key: method.label for key, method in all_methods().items()}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A problem of 8 unknowns, contracting by 0.95."""
    monkeypatch.setitem(problems.PROBLEMS, "tiny", (lambda n, inject: problems.MLP(8, n, inject), (4, 8)))
    return "tiny"


def row(method: str, step: float, gradient: float = 1e-3, residual: float | None = 1e-5, **more: Any) -> Row:
    times = {"step_ms": step, "forward_ms": step / 2, "backward_ms": step / 2, "quartiles_ms": [step, step]}
    found = {"problem": "p", "inject": "before", "n_iter": 30, "method": method, "cpu": times, "wall": times}
    return found | {"gradient_error": gradient, "residual": residual, "value_error": 0.0} | more


# ---- convergence and ratios


@pytest.mark.parametrize(
    ("found", "ours", "expected"),
    [
        (row("x", 1.0), None, True),
        (row("x", 1.0, residual=1.005e-4), None, True),  # the same number, summed in another order
        (row("x", 1.0, residual=2e-4), None, False),
        (row("x", 1.0, gradient=0.06), None, False),
        (row("x", 1.0, gradient=0.06), row("deq", 1.0, gradient=0.07), True),  # no worse than ours
        (row("x", 1.0, gradient=0.06), row("deq", 1.0, gradient=float("nan")), False),
        (row("x", 1.0, gradient=float("nan")), None, False),
        (row("x", 1.0, residual=float("nan")), None, False),
        (row("x", 1.0, residual=None), None, True),
        (row("bound", 1.0, gradient=1.0), None, None),
        ({"method": "x", "skipped": "not installed"}, None, None),
    ],
)
def test_converged(found: Row, ours: Row | None, expected: bool | None) -> None:
    assert report.converged(found, ours) is expected


def test_ratios_are_of_medians_and_to_converged_rows_only() -> None:
    rows = [
        row("eager", 10.0),
        row("torchdeq-broyden", 40.0),
        row("torchdeq-fixed", 2.0, residual=1e-2),  # fast, but it has not solved the problem
        row("torchdeq-anderson", 8.0),
        row("torchdeq-phantom", 1.0, gradient=0.04),  # cheap by design: never a contender
        row("deq", 5.0),
        row("jaxopt", 6.0),
        row("optimistix", 3.0, residual=1e-3),
        row("bound", 4.0, gradient=1.0),
    ]
    by_method = {r["method"]: r for r in report.derive(rows, KINDS, "cpu")}
    assert by_method["deq"]["ratio"] == {"eager": 2.0, "torchdeq": 8.0, "peer": 1.6, "jax": 1.2, "bound": 1.25}
    assert by_method["torchdeq-anderson"]["ratio"]["peer"] == 5.0  # the best of the others, not itself
    assert by_method["torchdeq-fixed"]["converged"] is False
    assert by_method["bound"]["converged"] is None


def test_no_ratio_to_a_torchdeq_that_did_not_converge() -> None:
    (_, ours) = report.derive([row("torchdeq-broyden", 40.0, residual=1.0), row("deq", 5.0)], KINDS, "cpu")
    assert ours["ratio"] == {}


def test_memory_rows_are_merged_by_problem_form_and_method() -> None:
    measured = {"kind": "memory", "problem": "p", "inject": "before", "method": "deq", "memory_mb": 3.0, "first_s": 2.0}
    (first, second) = report.derive([row("deq", 1.0), measured, row("eager", 1.0)], KINDS, "cpu")
    assert (first["memory_mb"], first["first_s"]) == (3.0, 2.0)
    assert "memory_mb" not in second


# ---- what is printed


def test_markdown_marks_the_unconverged_and_lets_a_converged_row_win() -> None:
    rows = [row("eager", 10.0, memory_mb=12.4), row("torchdeq-fixed", 2.0, residual=1e-2), row("deq", 5.0, gradient=6e-3)]
    text = outputs.markdown(report.derive(rows, KINDS, "cpu"), LABELS, "cpu").splitlines()
    summary, lines = text[:3], text[4:]
    numbers = [cell.strip() for cell in summary[2].strip("|").split("|")]
    assert numbers == ["p, N = 30, x before", "10.0", "–", "–", "2.0 †", "5.0", "–", "–", "2.0×", "–", "6.0e-03"]

    def cells(start: str) -> list[str]:
        (line,) = [line for line in lines if line.startswith(f"| {start}")]
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert lines[0] == "**p: loop of 30, x enters before it**"
    assert cells("eager loop") == ["eager loop", "10.0", "1.0×", "–", "1.0e-03", "12"]
    assert cells("TorchDEQ fixed") == ["TorchDEQ fixed-point, ift †", "2.0", "5.0×", "–", "1.0e-03", "–"]
    assert cells("deq") == ["deq, default", "**5.0**", "2.0×", "–", "6.0e-03", "–"]
    assert lines[-1].startswith("† not converged")


def test_text_tables_say_why_a_row_is_missing() -> None:
    skipped = {"problem": "p", "inject": "before", "n_iter": 30, "method": "jaxopt", "skipped": "not installed: jax"}
    text = report.text_tables(report.derive([row("deq", 5.0), skipped], KINDS, "cpu"), LABELS, "cpu")
    assert "jaxopt fixed-point, jitted: not installed: jax" in text
    assert "5.00" in text


def test_targets_and_compare() -> None:
    rows = report.derive([row("eager", 10.0), row("deq", 5.0, status="solve"), row("deq-peer-tol", 8.0)], KINDS, "cpu")
    assert "2.00×" in outputs.targets(rows, "cpu")
    text = outputs.compare([row("deq", 5.0), row("eager", 1.0)], [row("deq", 10.0), row("bound", 1.0)], LABELS, "cpu")
    _, _, line, only_new, only_old = text.splitlines()
    assert line.split()[-4:] == ["10.00", "5.00", "2.00×", "–"]  # no eager loop in both
    assert only_new == "only in this run: p, x before: eager loop"
    assert only_old == "only in the older run: p, x before: bound: the bodies of deq alone"
    assert outputs.compare([row("deq", 5.0)], [], LABELS, "cpu").startswith("no row is in both runs\nonly in this run")


def test_compare_divides_by_what_the_eager_loop_did() -> None:
    old, new = [row("eager", 10.0), row("deq", 10.0)], [row("eager", 20.0), row("deq", 10.0, kind="timing")]
    text = outputs.compare(new, [*old, {"kind": "memory", "problem": "p", "inject": "before", "method": "deq"}], LABELS, "cpu")
    assert [line.split()[-2:] for line in text.splitlines()[2:]] == [["0.50×", "1.00×"], ["1.00×", "2.00×"]]


def test_compare_reads_the_files_of_record(capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(__file__).resolve().parents[2] / "bench" / "results"
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    new, old = results / "cpu-tables-2026-11-25.json", results / "cpu-tables.json"
    assert cli.main(parser.parse_args(["--show", str(new), "--compare", str(old)])) == 0
    printed = capsys.readouterr().out
    assert "only in this run: mlp128sym, x before: eager loop; TorchDEQ Broyden, ift; " in printed
    assert "only in the older run: mlp128, x inside: " in printed
    assert "another machine" in printed


def test_all_threads_are_timed_apart_and_shown_beside() -> None:
    tasks = runs.tasks(["conv"], ["eager", "deq"], None, with_memory=False, with_threads=True)
    assert tasks[1] == {"kind": "threads", "problem": "conv", "plan": {"before": ["eager", "deq"]}}
    done = [{"problem": "conv", "inject": "before", "method": m, "kind": "threads"} for m in ("eager", "deq")]
    assert runs.pending(tasks[1], done) is None
    assert runs.pending(tasks[0], done) == tasks[0]
    rows = [row("torchdeq-broyden", 40.0), row("deq", 5.0)]
    rows += [row("torchdeq-broyden", 30.0, kind="threads", threads=2), row("deq", 4.0, kind="threads", threads=2)]
    _, ours = report.derive(rows, KINDS, "cpu")
    assert (ours["all_ms"], ours["all_threads"], ours["ratio"]["all"]) == (4.0, 2, 7.5)
    assert "7.50×" in outputs.targets([ours], "cpu")


def test_plot(tmp_path: Path) -> None:
    rows = report.derive([row("eager", 10.0), row("deq", 5.0), row("torchdeq-fixed", 2.0, residual=1.0)], KINDS, "cpu")
    outputs.plot(rows, LABELS, "cpu", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_compile_time_parts_add_up() -> None:
    watch = compile_time.Stopwatch()
    watch.seconds = {"passes": 0.5, "bodies": 2.0}
    metrics = {"_compile.compile_inner": [4.0], "OutputGraph.call_user_compiler": [3.0], "backward._backward_impl": [1.0]}
    parts = compile_time.split(10.0, metrics, watch)
    assert parts == {"dynamo_s": 1.0, "passes_s": 0.5, "graph_s": 3.5, "bodies_s": 2.0, "rest_s": 3.0}


# ---- tasks, interruption, resumption


def test_tasks_and_what_is_left_of_them() -> None:
    timing, *rest = runs.tasks(["conv"], ["eager", "deq-raw", "deq"], None, with_memory=True)
    assert timing["plan"] == {"before": ["eager", "deq-raw", "deq"], "inside": ["eager", "deq"]}
    assert [task["method"] for task in rest] == ["eager", "deq"]
    done = [{"problem": "conv", "inject": "before", "method": m} for m in ("eager", "deq-raw", "deq")]
    done.append({"problem": "conv", "inject": "before", "method": "eager", "kind": "memory"})
    left = runs.pending(timing, done)
    assert left is not None
    assert left["plan"] == {"inside": ["eager", "deq"]}
    assert runs.pending(rest[0], done) is None
    assert runs.pending(rest[1], done) == rest[1]


def test_rows_of_another_run_and_torn_lines_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    base = {"problem": "p", "inject": "before", "method": "eager"}
    lines = [json.dumps(base | {"run": "a", "n": 1}), json.dumps(base | {"run": "b"}), json.dumps(base | {"run": "a", "n": 2})]
    file.write_text("\n".join(lines) + '\n{"problem": "p", "inj')
    assert [r["n"] for r in runs.read_rows(file, "a")] == [2]
    assert runs.read_rows(tmp_path / "absent.jsonl", "a") == []


def test_an_interrupted_problem_keeps_its_rows(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    step = Step(load(tiny, "before"))
    original, calls = step.run, 0

    def run() -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:  # in the fifth turn
            raise KeyboardInterrupt
        return original()

    monkeypatch.setattr(step, "run", run)
    (found,) = measure.interleave({"eager": step}, {"eager": {"method": "eager"}}, 10, "tiny")
    assert found["repeats"] == 4
    calls = 8  # interrupted at the first step: there is nothing worth keeping
    with pytest.raises(KeyboardInterrupt):
        list(measure.interleave({"eager": step}, {"eager": {}}, 10, "tiny"))


# ---- measuring


def test_reference_against_a_dense_solve(tiny: str) -> None:
    truth = reference(load(tiny, "before"))
    case = load(tiny, "before").double()
    assert case.loop is not None
    x, (z,), c = case.inputs[0], truth.outputs, case.cotangents[0]
    W = case.loop.W.weight
    torch.testing.assert_close(case.loop.body(z, case.loop.injection(x)), z, rtol=1e-11, atol=1e-11)
    J = (1 - z.square())[:, :, None] * W.detach()
    w = torch.from_numpy(np.linalg.solve(np.eye(8) - J.transpose(1, 2).numpy(), (c / len(c)).numpy()[..., None])[..., 0])
    case.clear()
    case.loop.body(z, case.loop.injection(x)).backward(w)
    assert relative_error(case.gradients(), truth.gradients) < 1e-10


def test_torchdeq_counts(tiny: str) -> None:
    pytest.importorskip("torchdeq")
    case = load(tiny, "before")
    step = TorchDEQ(case, "fixed_point_iter", phantom=False)
    counts = step.counts()
    assert 5 < counts["iterations"] <= 40
    assert counts["vjps"] > 2
    errors = measure.errors(step, reference(load(tiny, "before")))
    assert errors["gradient_error"] < 1e-3
    assert errors["residual"] < 1e-4
    assert TorchDEQ(case, "fixed_point_iter", phantom=True).counts()["vjps"] == 1


@pytest.mark.parametrize("key", ["silva-broyden", "silva-fixed", "jaxopt", "optimistix"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of other libraries, about each other
def test_other_libraries_solve_what_the_reference_solves(tiny: str, key: str) -> None:
    method = all_methods()[key]
    for package in method.needs:
        pytest.importorskip(package)
    step = method.make(load(tiny, "before"))
    assert 5 < step.counts()["iterations"] <= 40
    errors = measure.errors(step, reference(load(tiny, "before")))
    assert errors["residual"] <= 1e-4 * report.RESIDUAL_SLACK
    assert errors["gradient_error"] < 1e-3


@pytest.mark.parametrize("key", ["torchdeq-broyden", "silva-fixed", "jaxopt", "optimistix"])
def test_a_library_that_is_missing_gives_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch, tiny: str, key: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    truth = reference(load(tiny, "before"))
    (found,) = measure.time_case(tiny, "before", [key], 1, truth)
    assert found["skipped"] == f"not installed: {', '.join(all_methods()[key].needs)}"


@pytest.mark.parametrize("name", ["mlp128", "conv", "transformer"])
def test_bodies_in_jax_are_those_in_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("jax")
    small = {"mlp128": problems.MLP(8, 5, "before"), "conv": problems.Conv(4, 5, 5, "before")}
    loop = small.get(name) or problems.Transformer(8, 2, 5, "before")
    x = torch.randn({"mlp128": (3, 8), "conv": (2, 4, 5, 5)}.get(name, (2, 3, 8)), generator=torch.Generator().manual_seed(0))
    injection, body = jax_peers.jax_body(loop)
    values = {n: p.detach().numpy() for n, p in loop.named_parameters()}
    u = injection(values, x.numpy())
    torch.testing.assert_close(jax_peers.to_torch(u), loop.injection(x).detach())
    found = jax_peers.to_torch(body(values, x.numpy() / 2, u))
    torch.testing.assert_close(found, loop.body(x / 2, loop.injection(x)).detach())


def test_memory_sees_a_block_that_comes_and_goes() -> None:
    found = memory.measure(lambda: np.ones(8 << 20))  # 64 MB
    assert found["first_s"] > 0
    if found["memory_mb"] is not None:
        assert 55 < found["memory_mb"] < 90


@pytest.mark.skipif(sys.platform != "linux", reason="peaks come from /proc")
def test_the_peak_of_a_process_is_its_own_not_its_parent_s() -> None:
    ballast = np.ones(8 << 20)  # 64 MB that the child does not have
    code = "from bench.tables import memory; print(memory.peak() - memory.resident())"
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 32
    assert ballast[-1] == 1


def test_end_to_end(monkeypatch: pytest.MonkeyPatch, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {
        "eager": Method("eager", "eager loop", "loop", Step, memory=True),
        "deq": Method("deq", "deq, default", "ours", lambda case: Deq(case, inner="eager")),
        "bound": Method("bound", "the bound", "bound", lambda case, deq: Bound(case, deq, "aot_eager"), body=True),
        "silva": Method("silva", "silva", "peer", Step, needs=("no_such_package",)),
    }
    for module in (cli, measure, runs):
        monkeypatch.setattr(module, "all_methods", lambda: table)

    def run_here(args: argparse.Namespace, task: Row) -> None:
        runs.child(argparse.Namespace(**vars(args) | {"child": json.dumps(task)}))

    monkeypatch.setattr(cli, "run_task", run_here)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    common = ["--problems", tiny, "--forms", "before", "--repeats", "2", "--out", str(tmp_path / "out")]
    assert cli.main(parser.parse_args([*common, "--json", str(tmp_path / "a.json")])) == 0
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["settings"] == {"threads": 1, "repeats": 2}
    assert torch.__version__.startswith(stored["versions"]["torch"])  # the distribution drops "+cu130"
    timed = {r["method"]: r for r in stored["rows"] if r.get("kind") != "memory"}
    assert [r["method"] for r in stored["rows"] if r.get("kind") == "memory"] == ["eager"]
    assert timed["silva"]["skipped"] == "not installed: no_such_package"
    ours, bound = timed["deq"], timed["bound"]
    assert (ours["status"], ours["repeats"]) == ("solve", 2)
    assert ours["reused"] in (True, False)
    assert ours["gradient_error"] < 0.05
    assert (bound["iterations"], bound["vjps"]) == (ours["iterations_max"], ours["vjps"])  # eager bodies linearise unseen
    assert "the bound" in capsys.readouterr().out
    # nothing is left to do for a second run that resumes
    monkeypatch.setattr(cli, "run_task", lambda args, task: pytest.fail(f"run again: {task}"))
    assert cli.main(parser.parse_args([*common, "--resume", "--markdown", "--compare", str(tmp_path / "a.json")])) == 0
    assert "1.00×" in capsys.readouterr().out


def test_an_unknown_problem_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of mlp128, "):
        load("mlp127", "before")
