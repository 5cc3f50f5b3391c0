"""``python -m bench reach``: the harness on a small local repository, and what it must not let pass."""

from __future__ import annotations

import argparse
import gc
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from bench.reach import child, cli, conduct, sources, table, ways
from bench.reach.drivers import MODELS
from bench.reach.manifest import Model, whole
from deq_compile.kernels.folder import VARIABLE, private

CODE = '''"""Published code: a weight-tied layer, and a script that runs when it is imported."""
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.W, self.steps = nn.Linear(8, 8), steps
        nn.init.orthogonal_(self.W.weight, gain=0.5)

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(self.steps):
            z = torch.tanh(self.W(z) + x)
        return z


raise RuntimeError("this trains for a week")
'''

STEP = CODE.splitlines().index("            z = torch.tanh(self.W(z) + x)") + 1

DRIVERS = """import time
import torch
from bench.reach import ways
from bench.reach.manifest import Case, Model
from bench.reach.sources import definitions
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx

ways.warm_up = lambda kind: None  # figures are read by nobody here, and nobody waits for compilers
compile_fx._compile_fx_inner = lambda gm, *_, **__: make_boxed_func(gm.forward)


def tied(tight):
    return Case(definitions("published.py").Tied(200 if tight else 40), (torch.randn(4, 8),))


def slow(tight):
    time.sleep(60)


def broken(tight):
    raise ValueError("no such layer")


MODELS = tuple(
    Model(name, "somebody/fixed-points", {commit!r}, "MIT", "a loop of 40", build)
    for name, build in (("tied", tied), ("slow", slow), ("broken", broken))
)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of clones with one repository, and its module of drivers, `fake_drivers`, to import."""
    where = tmp_path / "sources" / "somebody+fixed-points"
    where.mkdir(parents=True)
    (where / "published.py").write_text(CODE)
    git = ["git", "-C", str(where), "-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "published"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "fake_drivers.py").write_text(DRIVERS.replace("{commit!r}", repr(sources.commit_of(where))))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(ways, "warm_up", ways.warm_up)
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", compile_fx._compile_fx_inner)
    monkeypatch.setattr(torch, "solve", torch.solve)  # what a child replaces in its process comes back
    monkeypatch.setattr(torch.cuda, "synchronize", torch.cuda.synchronize)
    monkeypatch.setitem(vars(np), "Inf", np.inf)
    for name in ("fake_drivers", "published"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "sources"


def arguments(tmp_path: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    common = ["--drivers", "fake_drivers", "--sources", str(tmp_path / "sources")]
    return parser.parse_args([*common, "--json", str(tmp_path / "r.json"), "--page", str(tmp_path / "r.md"), *more])


def row(name: str = "tied", **changed: Any) -> dict[str, Any]:
    """A finished row, in which all is well."""
    way = {
        "graphs": 1,
        "breaks": 0,
        "step_ms": 10.0,
        "first_cpu_s": 10.0,
        "error": {"value": 1e-4, "gradient": 1e-4, "worst": 1e-4},
    }
    region = {"status": "solve", "kind": "loop of 40", "where": "published.py:14", "notes": []}
    found: dict[str, Any] = {"name": name, "repository": "somebody/fixed-points", "commit": "0" * 40, "licence": "MIT"}
    found |= {"iteration": "a loop of 40", "version": "", "truth": {}, "explain": {"reasons": [], "graph_breaks": []}}
    return found | {"eager": dict(way), "inductor": dict(way), "deq": way | {"regions": [region]}} | changed


def answers(tmp_path: Path, kind: str, model: str, *questions: str) -> list[dict[str, Any]]:
    """What a child says, in this process."""
    task = {"model": model, "kind": kind, "drivers": "fake_drivers", "sources": str(tmp_path / "sources"), "out": str(tmp_path)}
    replies = io.StringIO()
    child.serve(task | {"warm": 1}, io.StringIO("".join(f"{q}\n" for q in questions)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    threads, kind = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(kind)
    torch._dynamo.reset()
    gc.enable()
    gc.unfreeze()


def test_what_is_missing_is_said_with_its_fix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cli.chosen("fake_drivers", "tied")[0]
    assert sources.problem(model, folder) == ""
    where = folder / model.folder
    (where / "published.py").write_text(CODE + "# changed\n")
    assert "got changes in published.py" in sources.problem(model, folder)
    other = Model(model.name, model.repository, "f" * 40, "MIT", "", model.build)
    assert f"got commit {model.commit}" in sources.problem(other, folder)
    elsewhere = Model(model.name, "nobody/nothing", "f" * 40, "MIT", "", model.build)
    text = sources.problem(elsewhere, folder)
    assert "got no clone" in text
    assert f"git clone https://github.com/nobody/nothing {folder}/nobody+nothing" in text
    package = Model("a", "a/a", "", "MIT", "", model.build, package="no-such-package")
    assert "pip install no-such-package" in sources.problem(package, folder)
    assert cli.runnable([elsewhere, package], folder) == []
    assert "expected the package no-such-package, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="expected some of tied, slow, broken; got tide"):
        cli.chosen("fake_drivers", "tide")
    with pytest.raises(SystemExit, match="--sources: expected a folder"):
        cli.main(argparse.Namespace(child=None, table=False, sources=None))


def test_the_manifest_names_where_each_model_comes_from() -> None:
    names = [model.name for model in MODELS]
    assert len(names) == len(set(names))
    assert len({model.repository for model in MODELS}) >= 20
    for model in MODELS:
        assert model.package or len(model.commit) == 40, model.name
        assert model.licence, model.name


def test_a_script_is_imported_without_what_it_runs(folder: Path, tmp_path: Path) -> None:
    model = cli.chosen("fake_drivers", "tied")[0]
    sources.enter(model, folder)
    module = sources.definitions("published.py")
    assert module.Tied.forward.__code__.co_firstlineno == CODE.splitlines().index("    def forward(self, x):") + 1
    with pytest.raises(FileNotFoundError):
        sources.definitions("nowhere.py")
    with pytest.raises(TypeError, match="give the case a `pick`"):
        whole((1, 2))


def test_a_child_answers_with_figures_or_with_its_error(folder: Path, tmp_path: Path) -> None:
    counters.clear()  # a child has a process of its own
    ready, first, steps, turn, last = answers(tmp_path, "eager", "tied", "first", "steps", "turn", "last")
    assert ready == {"ready": True, "version": ""}
    assert first["graphs"] == steps["graphs"] == 0
    assert turn["ms"] > 0
    assert last["regions"] == []
    _, truth = answers(tmp_path, "truth", "tied", "first")
    assert truth["float64"] is True
    errors: dict[str, Any] = {"eager": {}, "inductor": {}, "deq": {}}
    conduct.compare(tmp_path, errors)
    assert errors["eager"]["error"]["value"] < 1e-5
    assert errors["eager"]["error"]["gradient"] < 1e-5
    assert errors["inductor"] == {}
    _, explained = answers(tmp_path, "explain", "tied", "explain")
    assert explained["explained"] == [f"solve loop of 40 somebody+fixed-points/published.py:{STEP}"]
    assert answers(tmp_path, "eager", "broken", "first")[-1] == {"error": "ValueError: no such layer"}


def test_errors_are_of_everything_and_of_the_worst() -> None:
    truth = {"value": torch.ones(4), "gradients": {"a": torch.ones(3), "b": torch.full((1,), 2.0)}}
    same = conduct.relative_error(truth, truth)
    assert same == {"value": 0.0, "gradient": 0.0, "worst": 0.0}
    off = {"value": torch.ones(4) * 1.5, "gradients": {"a": torch.ones(3)}}
    found = conduct.relative_error(off, truth)
    assert found["value"] == pytest.approx(0.5)
    assert found["worst"] == pytest.approx(1.0)  # b is missing
    assert found["gradient"] == pytest.approx((4 / 7) ** 0.5)


@pytest.mark.parametrize(
    ("changed", "mark"),
    [
        ({"value": 0.5, "gradient": 1e-4, "worst": 1e-4}, "**wrong**"),
        ({"value": 1e-4, "gradient": 0.5, "worst": 0.5}, "**wrong**"),
        ({"value": float("nan"), "gradient": 1e-4, "worst": 1e-4}, "**wrong**"),
        ({"value": 1e-3, "gradient": 1e-2, "worst": 0.5}, None),
    ],
)
def test_a_wrong_answer_is_marked(changed: dict[str, float], mark: str | None) -> None:
    found = row()
    found["deq"]["error"] = changed
    assert table.wrong(found) is (mark is not None)
    assert ("**wrong**" in " ".join(map(str, table.line(found)))) is (mark is not None)
    found["eager"] = found["eager"] | {"error": changed}  # no better itself: the user's own tolerance, not ours
    assert not table.wrong(found) or changed["value"] != changed["value"]


def test_a_crash_a_slow_step_and_a_dear_one_are_marked() -> None:
    fine = row()
    assert (table.crashed(fine), table.slower(fine), table.dearer(fine), table.replaced(fine)) == (False, False, False, True)
    assert "**" not in " ".join(map(str, table.line(fine)))
    crash = row(deq={"failed": "RuntimeError: no"})
    assert table.crashed(crash)
    assert "RuntimeError: no" in table.reasons([crash])
    assert not table.crashed(row(deq={"failed": "no"}, inductor={"failed": "no"}))  # Inductor fails as well
    late, dear = row(), row()
    late["deq"] |= {"step_ms": 10.4}
    dear["deq"] |= {"first_cpu_s": 13.0}
    assert "**1.04×**" in table.line(late)
    assert "**1.30×**" in table.line(dear)
    scattered = row()
    scattered["deq"] |= {"step_ms": 10.4, "quartiles_ms": [9.9, 10.6]}
    scattered["inductor"] |= {"quartiles_ms": [9.8, 10.1]}
    assert not table.slower(scattered)
    scattered["deq"]["quartiles_ms"] = [10.2, 10.6]
    assert table.slower(scattered)
    text = table.counts([fine, crash, late, dear])
    assert "4 models of 1 repositories" in text
    assert "0 wrong, 1 crashed; 1 more than 3 % slower than Inductor, 1 with a first step above" in text


def test_the_page_gives_reasons_word_for_word() -> None:
    said = "published.py:14: COUNTER, a value that tells how many iterations ran ('k' | it)"
    none = row(deq={"regions": []}, explain={"reasons": [said], "graph_breaks": []})
    assert table.reason(none) == said
    assert "('k' \\| it)" in table.reasons([none])
    none["explain"] = {"reasons": [], "graph_breaks": ["torch.equal"]}
    assert table.reason(none) == "no loop that repeats a map was met, and no call of a solver; Dynamo: torch.equal"
    assert "kept" in table.reason(row())
    assert table.reason(row(explain={"failed": "it died"})) == "explain failed: it died"


def test_a_process_that_dies_or_takes_too_long_is_a_result(folder: Path, tmp_path: Path) -> None:
    models = {model.name: model for model in cli.chosen("fake_drivers", None)}
    plan = conduct.Plan(folder, "fake_drivers", str(tmp_path / "cache"), 60.0)
    with pytest.raises(conduct.Failed, match="ValueError: no such layer"):
        conduct.Process(models["broken"], "eager", plan, tmp_path).ask("first")
    process = conduct.Process(models["slow"], "eager", plan, tmp_path)
    process.limit = 0.0
    with pytest.raises(conduct.Failed, match="longer than 0 s"):
        process.ask("first")
    assert process.child.poll() is not None
    with pytest.raises(conduct.Failed, match="the process"):
        process.ask("turn")


def test_an_interrupted_run_keeps_its_rows_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at, done = "slow", list[str]()

    def measure(model: Model, plan: conduct.Plan, out: Path) -> dict[str, Any]:
        if model.name == stop_at:
            raise KeyboardInterrupt
        done.append(model.name)
        return row(model.name)

    monkeypatch.setattr(conduct, "measure", measure)
    assert cli.main(arguments(tmp_path)) == 130
    assert [r["name"] for r in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["tied"]
    stop_at = ""
    assert cli.main(arguments(tmp_path, "--resume")) == 0
    assert done == ["tied", "slow", "broken"]
    page = (tmp_path / "r.md").read_text()
    assert "3 models of 1 repositories" in page
    (tmp_path / "r.md").unlink()
    assert cli.main(arguments(tmp_path, "--table")) == 0
    assert (tmp_path / "r.md").read_text() == page
    assert cli.main(arguments(tmp_path, "--list")) == 0
    assert "tied: somebody/fixed-points" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.thorough
def test_a_repository_from_end_to_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct, "TURNS", 3)
    monkeypatch.setenv(VARIABLE, str(private()))  # its own cache is cold: the C++ kernels would be compiled for each run of tests
    assert cli.main(arguments(tmp_path, "--models", "tied")) == 0
    found = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert [region["status"] for region in found["deq"]["regions"]] == ["solve"]
    assert found["deq"]["graphs"] == found["inductor"]["graphs"] == 1
    assert 0 < found["deq"]["error"]["value"] < 1e-3
    assert {way for way in ("eager", "inductor", "deq") if not found[way]["step_ms"] > 0} == set()
    assert {way for way in ("inductor", "deq") if not found[way]["first_cpu_s"] > 0} == set()
    assert "| tied" in (tmp_path / "r.md").read_text()
