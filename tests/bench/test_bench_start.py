"""``python -m bench start``: medians by row and cache, shares of Inductor's, and rows that must agree."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench import start


def row(name: str, cache: str, seconds: float, gradient: float = 1.0) -> dict[str, Any]:
    parts = {"import_s": 0.0, "compile_s": 1.0, "step_s": seconds - 1, "total_s": seconds, "cpu_s": 2 * seconds}
    return {"row": name, "cache": cache, "gradient": gradient, **parts}


def test_medians_and_shares() -> None:
    rows = [row("inductor", "cold", s) for s in (9.0, 10.0, 50.0)] + [row("deq", "cold", s) for s in (4.0, 5.0, 6.0)]
    assert start.medians(rows)["deq", "cold"] == {"import_s": 0, "compile_s": 1, "step_s": 4, "total_s": 5, "cpu_s": 10}
    last = start.table(rows).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == [
        "cold",
        "deq",
        "0.00",
        "1.00",
        "4.00",
        "5.00",
        "0.50",
        "10.0",
        "0.50",
    ]


def test_rows_that_disagree_end_it() -> None:
    start.check([row("inductor", "cold", 1), row("deq", "cold", 1, 1.005)])
    with pytest.raises(SystemExit, match="expected gradients of one norm"):
        start.check([row("inductor", "cold", 1), row("deq", "cold", 1, 1.1)])


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "PROGRAM", "raise RuntimeError('as it went')")
    args = argparse.Namespace(problem="mlp128", iterations=9, threads=1, timeout=60)
    with pytest.raises(SystemExit, match="as it went"):
        start.start("deq", "cold", "unused", args)
