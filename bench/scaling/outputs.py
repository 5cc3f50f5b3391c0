"""From rows to one table a sweep, and four panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.tables.report import FOOTNOTE, MISSING, UNCONVERGED, converged, number, step_ms

from .points import AXES, Point, Sweeps, coordinate, describe

Row = dict[str, Any]


def by_point(rows: Sequence[Row], kind: str) -> dict[str, dict[str, Row]]:
    """Point -> method -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("kind", "timing") == kind:
            found.setdefault(row["problem"], {})[row["method"]] = row
    return found


def methods_of(rows: Sequence[Row]) -> list[str]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(row["method"] for row in rows))


def value_of(row: Row | None, sweep: str, clock: str) -> float | None:
    """What a sweep shows of a row: MB, or ms a step."""
    if row is None:
        return None
    return row.get("memory_mb") if sweep == "memory" else step_ms(row, clock)


def text_tables(rows: Sequence[Row], plan: Sweeps, labels: dict[str, str], clock: str) -> str:
    parts = [text_table(rows, sweep, points, labels, clock) for sweep, points in plan.items() if points]
    return "\n\n".join([*parts, FOOTNOTE, *reasons(rows, labels)])


def text_table(rows: Sequence[Row], sweep: str, points: list[Point], labels: dict[str, str], clock: str) -> str:
    """One line a point: every row's figure, what deq did, and how many times the others' deq's is."""
    table = by_point(rows, "memory" if sweep == "memory" else "timing")
    methods = methods_of(rows)
    others = [method for method in methods if method != "deq"]
    headers = [AXES[sweep].split()[-1], *(labels.get(method, method) for method in methods)]
    headers += [] if sweep == "memory" else ["iterations", "VJPs", "status"]
    headers += [f"{labels.get(method, method)} / deq" for method in others]
    lines = []
    for point in points:
        found = table.get(point.name, {})
        ours = found.get("deq")
        line: list[Any] = [coordinate(sweep, point)]
        for method in methods:
            row = found.get(method)
            weak = row is not None and sweep != "memory" and converged(row, ours) is False
            line.append(number(value_of(row, sweep, clock), ".2f") + (f" {UNCONVERGED}" if weak else ""))
        if sweep != "memory":
            told = ours or {}
            line += [number(told.get("iterations"), ".3g"), number(told.get("vjps"), "d"), told.get("status", MISSING)]
        own = value_of(ours, sweep, clock)
        for method in others:
            value = value_of(found.get(method), sweep, clock)
            line.append(MISSING if value is None or not own else f"{value / own:.2f}×")
        lines.append(line)
    unit = "peak MB of a step" if sweep == "memory" else f"ms a step ({clock})"
    title = f"{unit} against the {AXES[sweep]}; {describe(sweep, points)}"
    return f"{title}\n{tabulate(lines, headers=headers, disable_numparse=True, stralign='right')}"


def reasons(rows: Sequence[Row], labels: dict[str, str]) -> list[str]:
    """Why rows are missing, once each."""
    return list(dict.fromkeys(f"{labels.get(r['method'], r['method'])}: {r['skipped']}" for r in rows if "skipped" in r))


def plot(rows: Sequence[Row], plan: Sweeps, labels: dict[str, str], clock: str, path: Path) -> None:
    """A panel a sweep, both axes logarithmic; hollow where a row did not converge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {sweep: points for sweep, points in plan.items() if points}
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.6), layout="constrained", squeeze=False)
    for ax, (sweep, points) in zip(axes[0], shown.items(), strict=True):
        table = by_point(rows, "memory" if sweep == "memory" else "timing")
        for index, method in enumerate(methods_of(rows)):
            curve = []
            for point in points:
                found = table.get(point.name, {})
                value = value_of(found.get(method), sweep, clock)
                if value:  # no point on a logarithmic axis for what cost nothing
                    weak = sweep != "memory" and converged(found[method], found.get("deq")) is False
                    curve.append((coordinate(sweep, point), value, weak))
            if not curve:
                continue
            xs, ys = [x for x, _, _ in curve], [y for _, y, _ in curve]
            ax.plot(xs, ys, color=f"C{index}", label=labels.get(method, method))
            for x, y, weak in curve:
                ax.plot(x, y, "o", color=f"C{index}", markerfacecolor="white" if weak else f"C{index}")
        ax.set(xscale="log", yscale="log", xlabel=AXES[sweep], title=describe(sweep, points))
        ax.set_ylabel("peak memory of a step (MB)" if sweep == "memory" else f"step (ms, {clock})")
        ax.title.set_fontsize("small")
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
