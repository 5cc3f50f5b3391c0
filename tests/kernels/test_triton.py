"""The Triton kernels without a GPU: interpreted, in a process of their own, and compiled ahead of time, with budgets."""

from __future__ import annotations

import re

import pytest

from tests.fresh import python

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
PIPELINED = {"step_fused", "dots", "transpose_fused", "transpose_dots", "multisecant_fused", "multisecant_dots"}
PIPELINED |= {"begin", "project", "extend", "thin_weights"}
DECIDING = {"step_fused", "dots", "combine", "project", "extend"}
NARROW = {"summarise", "finish", "addresses"}  # read one number a sample, or none


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


LANES = {  # two, for two workers: each takes ten seconds before its first test
    "kernels": (
        ["kernels/test_triton", "kernels/test_gcr", "kernels/test_weights", "kernels/test_stopping", "kernels/test_recycle"],
        150,
    ),
    "engines": (
        [
            "region/test_graphs",
            "region/test_graphs_host",
            "region/test_graphs_failures",
            "region/test_graphs_robust",
            "region/test_recycling",
        ],
        45,
    ),
}


@pytest.mark.parametrize(("names", "least"), LANES.values(), ids=LANES)
def test_interpreter_lane(names: list[str], least: int, request: pytest.FixtureRequest) -> None:
    files = [f"tests/{name}_interpreted.py" for name in names]
    which = request.config.option.markexpr
    program = f"import torch, pytest\nraise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', '-m', {which!r}, *{files}]))"
    done = python(program, "torch", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least


def test_few_steps_do_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 steps the tiles are widest."""
    from bench import kernels

    monkeypatch.setattr(kernels, "kernels", lambda found=kernels.kernels: {"extend": found()["extend"]})
    (row,) = kernels.rows((80,), (8,), ("fp32",))
    assert kernels.within_budget(row), row
    assert kernels.BUDGETS[80] == (168, 0)


def test_a_preconditioned_step_is_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is judged by what the thin products have found."""
    from bench import kernels

    constants = kernels.constants
    monkeypatch.setattr(kernels, "constants", lambda *args: {**constants(*args), "GIVEN": 2})
    for name in ("step_fused", "dots", "combine"):
        row = kernels.compile_one(name, kernels.kernels()[name], 90, "fp32", 41, False)
        assert kernels.within_budget(row), row
        assert row.load_width == 16, row


@pytest.mark.parametrize("D", [64, 1024])
def test_short_rows_are_within_the_budget(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose update is one tile."""
    from bench import kernels
    from deq_compile.kernels import tiles

    by_shape = tiles.by_shape
    monkeypatch.setattr(tiles, "by_shape", lambda B, _, steps: by_shape(128, D, steps))
    for steps in (20, 41):
        row = kernels.compile_one("step_fused", kernels.kernels()["step_fused"], 90, "fp32", steps, True)
        assert kernels.within_budget(row), row


@pytest.mark.parametrize("arch", [*(pytest.param(arch, marks=pytest.mark.thorough) for arch in (80, 89)), 90])
def test_ahead_of_time_budgets(arch: int) -> None:
    """No spills, at most 168 registers, 16-byte loads of the steps, pipelined dot products, shared memory within 48 KB."""
    from bench.kernels import rows, within_budget

    seen = set()
    largest = rows((arch,), (65,), ("fp32",)) if arch == 90 else ()  # a memory of 64
    for row in (*rows((arch,), (41,)), *largest):
        seen.add((row.kernel, row.form))
        assert within_budget(row), row
        assert row.shared_bytes <= 48 * 1024, row
        if row.kernel not in NARROW:
            assert row.load_width == 16, row
        if row.kernel in PIPELINED:
            assert row.async_copies > 0, row
        # As the body of a WHILE node, what ends an iteration decides about the next one; nothing else may, outside a graph.
        assert row.sets_condition == (row.form == "graph" and row.kernel in DECIDING), row
    if arch == 90:
        assert {("step_fused", "graph"), ("dots", "graph"), ("combine", "graph"), ("start", "graph")} <= seen
