"""A picture of a training's solves."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..region.records import SolveRecord
from .optional import need
from .rows import COLUMNS, WORDS, Names, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records: TypeAlias = "Iterable[SolveRecord | Mapping[str, Any]] | str | os.PathLike[str]"
# A line a measure: its panel, its name, its style. In both panels the forward has a full line and the backward a broken one.
LINES = (
    (0, "iterations", "-", "iterations"),
    (0, "vjps", "--", "VJPs"),
    (1, "residual", "-", "residual"),
    (1, "adjoint_residual", "--", "adjoint residual"),
    (1, "adjoint_error", ":", "adjoint error, estimated"),
)


def plot_solves(records: Records, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw iterations and residuals over the course of a training: a colour a region, crosses where its loop was kept.

    Args:
        records: records of `record_solves`, each a step of its region; or rows of a `SolveLogger`; or the path of its CSV file.
        path: where to write the figure; its ending names the format (.png, .svg, .pdf). None: nowhere.

    Returns:
        The matplotlib figure. No state of `pyplot` changes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no records.
    """
    figures = need("matplotlib.figure", "plot_solves", "matplotlib")
    series = _series(records)
    if not series:
        raise ValueError(
            "plot_solves: expected at least one record, got none. "
            "Fix: explain(model)(*inputs) says whether the model has a region"
        )
    figure: Figure = figures.Figure(figsize=(8, 6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 1, sharex=True))
    for number, (region, rows) in enumerate(series.items()):
        for place, name, style, label in LINES:
            _draw(panels[place], rows, name, {"linestyle": style, "color": f"C{number}", "label": f"{region}: {label}"})
    panels[0].set(ylabel="a step, mean of the samples", ylim=(0, None))
    panels[1].set(ylabel="relative", xlabel="training step")
    heights: list[Any] = [line.get_ydata() for line in panels[1].lines]
    if any(0 < value < math.inf for height in heights for value in height):  # others have no logarithm
        panels[1].set(yscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize="small")
    if path is not None:
        figure.savefig(os.fspath(path), dpi=120)
    return figure


def _draw(panel: Axes, rows: list[dict[str, Any]], name: str, look: dict[str, Any]) -> None:
    """One measure of one region; where a row has none, the line has a gap."""
    if all(row[name] is None for row in rows):
        return
    steps = [row["step"] for row in rows]
    values = [float("nan") if row[name] is None else row[name] for row in rows]
    panel.plot(steps, values, linewidth=1.2, marker="." if len(rows) < 40 else "", **look)
    kept = [(row["step"], row[name]) for row in rows if row["verdict"] == "kept" and row[name] is not None]
    if kept and name == "iterations":
        panel.plot(*zip(*kept, strict=True), "x", color=look["color"], label=f"{look['label']}, kept")


def _series(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Rows by region, in order."""
    given = _read(Path(records)) if isinstance(records, str | os.PathLike) else list(records)
    names, counts = Names(), dict[str, int]()
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in given:
        if isinstance(entry, SolveRecord):
            counts[entry.region] = counts.get(entry.region, 0) + 1
            (row,) = rows_of([entry], counts[entry.region], 1, names)
        else:
            row = dict(entry)
        found.setdefault(row["region"], []).append(row)
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a CSV file, with numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as lines:
        whole = [row for row in csv.DictReader(lines) if all(row.get(name) is not None for name in COLUMNS)]
    return [{name: value if name in WORDS else float(value) if value else None for name, value in row.items()} for row in whole]
