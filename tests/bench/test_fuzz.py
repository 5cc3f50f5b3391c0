"""A thin slice of the fuzzer (`python -m bench fuzz`), and the fuzzer's own parts."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.fuzz import oracle
from bench.fuzz.cli import save
from bench.fuzz.forms import FORMS
from bench.fuzz.grammar import Recipe, random_recipe, source
from bench.fuzz.shrink import shrink
from bench.fuzz.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]


@settings(
    max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(st.randoms(use_true_random=False))
def test_random_programs_come_out_right(rng: random.Random) -> None:
    text = source(random_recipe(rng))
    verdict = oracle.judge(text)
    assert not verdict.wrong, f"{verdict.detail}\n{text}"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_program(form: str) -> None:
    names = compile(source(Recipe(form=form, first=("linear",), second=("tanh",))), form, "exec").co_names
    assert {"Model", "make_inputs"} <= set(names)


def test_the_grammar_is_wide() -> None:
    assert len(STAGES) >= 30
    assert len(FORMS) >= 30


def test_a_recipe_names_one_program() -> None:
    first, second = (source(random_recipe(random.Random("5/3"))) for _ in range(2))
    assert first == second


def test_what_is_expected() -> None:
    plain = Recipe(form="plain", first=("linear_tanh",))
    assert oracle.judge(source(plain)).kind == "rewritten-right"
    assert oracle.judge(source(dataclasses.replace(plain, gain=0.6, count=7))).kind == "kept-right"
    trajectory = oracle.judge(source(dataclasses.replace(plain, form="trajectory", count=8)))
    assert (trajectory.kind, trajectory.reasons) == ("refused-right", ("ESCAPES",))


def test_a_failure_is_shrunk_and_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A judge to whom every tanh is wrong: the saved program is the shortest that has one."""

    def judge(text: str) -> oracle.Verdict:
        return oracle.Verdict("WRONG" if "torch.tanh(h" in text or "torch.tanh(z" in text else "not-a-loop")

    monkeypatch.setattr("bench.fuzz.cli.judge", judge)
    recipe = Recipe(form="momentum", first=("roll", "tanh", "linear"), second=("gelu",), batch=4, place="closure")
    path = save(recipe, tmp_path, "failure.py")
    assert shrink(recipe, lambda r: judge(source(r)).wrong) == Recipe(form="plain", first=("tanh",))
    assert oracle.judge(path.read_text()).kind == "rewritten-right"
    done = subprocess.run([sys.executable, str(path)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rewritten-right")
