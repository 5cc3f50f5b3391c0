"""The site's diagrams: boxes in rows and the arrows between them, drawn by matplotlib as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

WIDTH, HEIGHT, GAP_X, GAP_Y = 2.6, 0.9, 1.0, 0.75
USER, OURS, TORCH = "#e8e8e8", "#cfe3f7", "#fde2c4"  # whose part it is


@dataclass(frozen=True)
class Diagram:
    """Rows of boxes from the top; arrows by box name, with a label.

    rows    each box is (name, text, colour)
    arrows  (from, to, label)
    """

    rows: Sequence[Sequence[tuple[str, str, str]]]
    arrows: Sequence[tuple[str, str, str]]


DIAGRAMS = {
    "pipeline": Diagram(
        [
            [("model", "your model", USER), ("dynamo", "Dynamo\n+ capture/", TORCH), ("graph", "FX graph\nwith markers", USER)],
            [("bodies", "bodies\nf and its VJP", OURS), ("rewrite", "rewritten graph", OURS), ("passes", "passes/", OURS)],
            [("region", "region/ at run time", OURS), ("inductor", "Inductor", TORCH), ("rest", "the rest of\nthe model", USER)],
        ],
        [
            ("model", "dynamo", ""), ("dynamo", "graph", "traces"),
            ("graph", "passes", "find, judge"), ("passes", "rewrite", "replace"),
            ("rewrite", "bodies", "extract"), ("rewrite", "rest", ""), ("rest", "inductor", ""), ("bodies", "region", "solve"),
        ],
    ),
    "capture": Diagram(
        [
            [
                ("loop", "loop with a test", USER),
                ("call", "call of a solver", USER),
                ("hook", "hook or\nautograd Function", USER),
            ],
            [
                ("exits", "exits: the test becomes\na marker", OURS),
                ("trial", "trial: run once on a\nproblem that is known", OURS),
                ("tried", "trial: a linear map\nwith a known Jacobian", OURS),
            ],
            [
                ("told", "what the loop says\nis served from the solve", OURS),
                ("markers", "markers in one graph", OURS),
                ("left", "left alone,\nwith a reason", USER),
            ],
        ],
        [
            ("loop", "exits", ""), ("call", "trial", ""), ("hook", "tried", ""), ("exits", "told", ""), ("told", "markers", ""),
            ("trial", "markers", ""), ("tried", "left", "not understood"),
        ],
    ),
    "passes": Diagram(
        [
            [
                ("find", "find\nrepeated segments", OURS),
                ("judge", "judge\nsafe to solve?", OURS),
                ("hoist", "hoist\nwhat z does not enter", OURS),
            ],
            [
                ("skip", "skipped,\nwith a reason", USER),
                ("replace", "replace\none operator a loop", OURS),
                ("extract", "extract\nbody, state, operands", OURS),
            ],
        ],
        [
            ("find", "judge", ""), ("judge", "hoist", "yes"), ("judge", "skip", "no"), ("hoist", "extract", ""),
            ("extract", "replace", ""),
        ],
    ),
    "decide": Diagram(
        [
            [("call", "a call", USER), ("due", "comparison due?\ncalls 0, 1, 2, 4, 8, …", OURS), ("solve", "solve", OURS)],
            [
                ("both", "run both: the loop\nand the solve", OURS),
                ("agree", "same value and\ngradient?", OURS),
                ("missed", "tolerance\nmissed?", OURS),
            ],
            [
                ("follow", "follow: the loop's\niterates, further", OURS),
                ("solved", "solve", OURS),
                ("kept", "kept: the loop\nas it was", USER),
            ],
        ],
        [
            ("call", "due", ""), ("due", "solve", "no"), ("due", "both", "yes"), ("both", "agree", ""), ("agree", "kept", "no"),
            ("both", "follow", "several\nfixed points"), ("solve", "missed", ""),
            ("missed", "kept", "this call"), ("agree", "solved", "yes"),
        ],
    ),
    "region": Diagram(
        [
            [
                ("forward", "forward:\nBroyden from z0", OURS),
                ("factors", "steps S and products C:\nthe inverse Jacobian", OURS),
                ("z", "f(z*) goes out", USER),
            ],
            [
                ("last", "last evaluation:\nthe linearisation", OURS),
                ("adjoint", "adjoint: w = q + Jᵀ w,\nrefined until r is small", OURS),
                ("q", "cotangent q comes in", USER),
            ],
            [("grads", "gradients of\nparameters and inputs", USER), ("cert", "certificate:\nadjoint residual", OURS)],
        ],
        [
            ("forward", "factors", ""), ("factors", "z", ""),
            ("factors", "adjoint", "reused where\nit pays"), ("forward", "last", ""),
            ("last", "adjoint", "VJPs"), ("q", "adjoint", ""), ("adjoint", "cert", ""), ("adjoint", "grads", ""),
        ],
    ),
    "kernels": Diagram(
        [
            [
                ("iteration", "iteration/: progress, codes,\nthe stopping rule", OURS),
                ("table", "one table of residual\nsequences", USER),
            ],
            [("aten", "ATen\nreference", TORCH), ("cpp", "C++\nCPU", OURS), ("triton", "Triton\nGPU", OURS)],
            [
                ("fp64", "float64 tests", USER),
                ("vector", "vectors as wide\nas the registers", USER),
                ("aot", "interpreter, ahead-of-time\nbudgets", USER),
            ],
        ],
        [
            ("table", "iteration", "holds"), ("iteration", "aten", ""), ("iteration", "cpp", ""), ("iteration", "triton", ""),
            ("aten", "fp64", ""), ("cpp", "vector", ""), ("triton", "aot", ""),
        ],
    ),
}  # fmt: skip


def draw(diagram: Diagram, path: Path) -> None:
    """One diagram into an SVG file, the same bytes each time."""
    columns = max(len(row) for row in diagram.rows)
    size = (columns * (WIDTH + GAP_X), len(diagram.rows) * (HEIGHT + GAP_Y))
    figure, axes = plt.subplots(figsize=size)
    places: dict[str, tuple[float, float]] = {}
    for down, row in enumerate(diagram.rows):
        for across, (name, text, colour) in enumerate(row):
            x, y = across * (WIDTH + GAP_X), -down * (HEIGHT + GAP_Y)
            box = FancyBboxPatch(
                (x, y), WIDTH, HEIGHT, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="#555555", linewidth=0.8
            )
            axes.add_patch(box)
            axes.text(x + WIDTH / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=10)
            places[name] = (x + WIDTH / 2, y + HEIGHT / 2)
    for start, end, label in diagram.arrows:
        _arrow(axes, places[start], places[end], label)
    axes.set(xlim=(-0.1, size[0] - GAP_X + 0.1), ylim=(-size[1] + HEIGHT + GAP_Y - 0.1, HEIGHT + 0.1))
    axes.axis("off")
    with plt.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], label: str) -> None:
    """From the edge of one box to that of another."""
    begin, stop = _edge(start, end), _edge(end, start)
    axes.annotate("", xy=stop, xytext=begin, arrowprops={"arrowstyle": "-|>", "color": "#333333", "linewidth": 1})
    if label:
        middle = ((begin[0] + stop[0]) / 2, (begin[1] + stop[1]) / 2)
        axes.text(*middle, label, ha="center", va="center", fontsize=8, backgroundcolor="white")


def _edge(centre: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Where the line to `other` leaves the box around `centre`."""
    dx, dy = other[0] - centre[0], other[1] - centre[1]
    share = min((WIDTH / 2 + 0.05) / abs(dx) if dx else 1.0, (HEIGHT / 2 + 0.05) / abs(dy) if dy else 1.0)
    return centre[0] + dx * share, centre[1] + dy * share


def draw_all(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, diagram in DIAGRAMS.items():
        draw(diagram, folder / f"{name}.svg")
