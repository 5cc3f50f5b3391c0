"""What the GPU path is to reach, beside what was measured. Nothing is said of what no device has measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tabulate import tabulate

from . import ways
from .report import heading
from .store import Results, Row

NOT_MEASURED = "not measured"
# "At equal gradient error": ours may be this much above the other's.
EQUAL_ERROR = 1.1


@dataclass(frozen=True)
class Measured:
    """A figure as text, and whether it reaches the goal."""

    text: str
    met: bool


@dataclass(frozen=True)
class Goal:
    name: str
    wanted: str
    measure: Callable[[Results], Measured | None]


def one_graph(results: Results) -> Measured | None:
    """Forward and adjoint both on the WHILE engine in the first part, and a forward that asks the device nothing."""
    rows = [r for r in results.rows if r["what"] == "one compiled model" and r.get("engine") == "while"]
    silent = [r for r in results.rows if r["what"].startswith("9: a forward that asks")]
    if not rows or not silent:
        return None
    ran = {side: rows[-1].get(side) or ["loop"] for side in ("forward", "adjoint")}
    quiet = all(r.get("ok") is True for r in silent)
    text = f"forward {'/'.join(ran['forward'])}, adjoint {'/'.join(ran['adjoint'])}, questions {'none' if quiet else 'some'}"
    return Measured(text, rows[-1].get("ok") is True and all(v == ["while"] for v in ran.values()) and quiet)


def launches(results: Results) -> Measured | None:
    found = [r["launches"] for r in _solves(results) if r.get("launches") is not None]
    return Measured(str(max(found)), max(found) <= 2) if found else None


def bandwidth(results: Results) -> Measured | None:
    """The smallest share of the copy bandwidth over the two shapes of most bytes, float32 factors, the most steps stored."""
    steps = [r for r in results.rows if r["part"] == "kernels" and r["what"] == "step" and r.get("factors") == "float32"]
    largest: dict[str, Row] = {}
    for row in steps:
        if row["shape"] not in largest or row["MB"] > largest[row["shape"]]["MB"]:
            largest[row["shape"]] = row
    two = sorted(largest.values(), key=lambda r: -r["MB"])[:2]
    if len(two) < 2:
        return None
    text = ", ".join(f"{r['shape']} {r['share_of_copy']:.0%}" for r in two)
    return Measured(text, all(r["share_of_copy"] >= 0.85 for r in two))


def beyond_body(results: Results) -> Measured | None:
    rows = [r for r in _solves(results) if (r["B"], r["D"]) == (128, 1024) and r.get("us_per_iteration_beyond_body") is not None]
    if not rows:
        return None
    row = rows[-1]
    figure = row["us_per_iteration_beyond_body"]
    return Measured(f"{figure} µs ({row['iterations']} iterations)", figure <= 10)


def _solves(results: Results) -> list[Row]:
    """Rows of captured solves that ran as WHILE graphs."""
    return [r for r in results.rows if r["what"] == "3, 4, 7: a solve" and r.get("engine") == "while" and "iterations" in r]


def step(results: Results, problem: str, way: str) -> Row | None:
    """The timed row of a workload and way; None where there is none."""
    rows = [r for r in results.rows if r["what"] == "step" and r.get("problem") == problem and r.get("way") == way and "ms" in r]
    return rows[-1] if rows else None


def against_peer(problem: str, times: float) -> Callable[[Results], Measured | None]:
    def measure(results: Results) -> Measured | None:
        ours, peer = step(results, problem, ways.OURS), step(results, problem, ways.PEER)
        if ours is None or peer is None:
            return None
        ratio = peer["ms"] / ours["ms"]
        text = f"{ratio:.1f}× (errors {ours['gradient_error']:.0e} and {peer['gradient_error']:.0e})"
        return Measured(text, ratio >= times and ours.get("ok") is True)

    return measure


def against_inductor(results: Results) -> Measured | None:
    """The fastest of our ways whose gradient error is not above that of the compiled loop."""
    other = step(results, "lm", ways.INDUCTOR)
    ours = [r for way in ways.DEQ if (r := step(results, "lm", way)) is not None]
    if other is None or not ours:
        return None
    equal = [r for r in ours if r["gradient_error"] <= EQUAL_ERROR * other["gradient_error"]]
    if not equal:
        best = min(r["gradient_error"] for r in ours)
        return Measured(f"none at equal error: {best:.0e} against {other['gradient_error']:.0e}", False)
    best_row = min(equal, key=lambda r: r["ms"])
    ratio = other["ms"] / best_row["ms"]
    return Measured(f"{ratio:.1f}× ({best_row['way']})", ratio >= 2 and best_row.get("ok") is True)


def raw_reuse(results: Results) -> Measured | None:
    """Backward of one raw reuse against a full solve to 1e-4 that reuses nothing, same engine, MDEQ."""
    raw, full = step(results, "mdeq", ways.RAW), step(results, "mdeq", ways.FULL)
    if raw is None or full is None:
        return None
    ratio = full["ms_backward"] / raw["ms_backward"]
    return Measured(f"{ratio:.1f}×", ratio >= 13)


GOALS = (
    Goal("whole solve as one graph, no host in it, forward and adjoint", "while, while, none", one_graph),
    Goal("solver launches an iteration", "≤ 2", launches),
    Goal("share of copy bandwidth, two largest shapes", "≥ 85 %", bandwidth),
    Goal("beyond the body, B128 D1024, an iteration", "≤ 10 µs", beyond_body),
    Goal("mlp128 step against TorchDEQ's formulation, eager", "≥ 10×", against_peer("mlp128", 10)),
    Goal("MDEQ-CIFAR step against TorchDEQ's formulation, eager", "≥ 3×", against_peer("mdeq", 3)),
    Goal("language-model block against torch.compile, equal gradient error", "≥ 2×", against_inductor),
    Goal("raw-reuse backward against a full solve, MDEQ-CIFAR", "≥ 13×", raw_reuse),
)


def table(results: Results) -> str:
    """Goal, wanted, measured, met or not: as text, under a line about the device."""
    lines = []
    for goal in GOALS:
        found = None if results.rehearsed else goal.measure(results)
        lines.append(
            [goal.name, goal.wanted, *(("", NOT_MEASURED) if found is None else (found.text, "met" if found.met else "missed"))]
        )
    return heading(results) + "\n\n" + tabulate(lines, ["goal", "wanted", "measured", ""], disable_numparse=True)
