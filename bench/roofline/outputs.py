"""From rows to tables and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .ceilings import KINDS, MEMORY, level_of
from .measure import CLEARED

Row = dict[str, Any]
MISSING = "–"
LABELS = {"step": "Broyden step", "move": "adjoint's move", "make": "making M", "apply": "applying M"}
BRIEF_STEPS = 15  # of the table with one line a shape
SHORT = 32  # elements of a sample that count as few


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def table(lines: list[list[Any]], headers: Sequence[str], markdown: bool) -> str:
    return tabulate(lines, headers=headers, tablefmt="github" if markdown else "simple", disable_numparse=True, stralign="right")


def curve_table(curve: list[dict[str, float]], caches: dict[str, int], markdown: bool) -> str:
    """GB/s by the size of the set."""
    levels = " ".join(f"{name} {size(count)}" for name, count in caches.items()) or "caches unknown"
    lines = [[size(p["bytes"]), level_of(p["bytes"], caches), *(f"{p[kind]:.1f}" for kind in KINDS)] for p in curve]
    title = f"{levels}; GB/s on one thread, several streams; loads and stores both count"
    return f"{title}\n\n{table(lines, ('set', 'fits into', *KINDS), markdown)}"


def curve_line(curve: list[dict[str, float]], caches: dict[str, int]) -> str:
    """Half of each cache, and the largest set."""
    halves = {count // 2 for count in caches.values()} | {curve[-1]["bytes"]}
    points = [p for p in curve if p["bytes"] in halves]
    speeds = [f"{size(p['bytes'])}: {', '.join(f'{p[kind]:.0f}' for kind in KINDS)}" for p in points]
    return f"GB/s of reading, copying, updating; {'; '.join(speeds)}"


def kernel_table(rows: list[Row], markdown: bool) -> str:
    """A line a kernel and shape."""
    headers = (
        "kernel", "B x D", "n", "moved", "set", "fits into", "GB/s", "Gflop/s", "faults",
        "hot us", "floor us", "ratio", "cold us", "floor us", "ratio", "floor from",
    )  # fmt: skip
    lines = []
    for row in rows:
        line = [row["kernel"], f"{row['B']} x {row['D']}", row["n"], size(row["bytes"]), size(row["set_bytes"]), row["level"]]
        line += [f"{1e-3 * row[what] / row['hot_us']:.3g}" for what in ("bytes", "flops")] + [f"{row['faults']:.0f}"]
        for kind in ("hot", "cold"):
            line += [f"{row[f'{kind}_us']:.1f}", f"{row[f'{kind}_floor_us']:.2f}", ratio(row, kind)]
        lines.append([*line, row["limit"]])
    return table(lines, headers, markdown)


def ratio(row: Row, kind: str) -> str:
    found = row[f"{kind}_us"] / row[f"{kind}_floor_us"]
    return f"{found:.1f}" if found < 100 else ">100"


def brief_table(rows: list[Row], markdown: bool) -> str:
    """A line a shape at `BRIEF_STEPS` steps: microseconds of the hot call, and its ratio to the floor, hot and cold."""
    lines = []
    for B, D in dict.fromkeys((row["B"], row["D"]) for row in rows):
        found = {row["kernel"]: row for row in rows if (row["B"], row["D"], row["n"]) == (B, D, BRIEF_STEPS)}
        if not found:
            continue
        cells = [
            f"{row['hot_us']:.{0 if row['hot_us'] >= 100 else 1}f}: {ratio(row, 'hot')}, {ratio(row, 'cold')}" if row else MISSING
            for row in map(found.get, LABELS)
        ]
        step = found.get("step") or next(iter(found.values()))
        lines.append([f"{B} x {D}", size(step["set_bytes"]), step["level"], *cells])
    title = f"{BRIEF_STEPS} steps stored; us of a hot call: times its floor hot, cold ({size(CLEARED)} read and written before)"
    return f"{title}\n\n{table(lines, ('B x D', 'set', 'fits into', *LABELS.values()), markdown)}"


def summary(rows: list[Row], markdown: bool) -> str:
    """Median ratios hot and cold, and how many rows, by what the floor comes from."""
    groups: dict[str, list[Row]] = {}
    order = ("call", "arithmetic", "L1", "L2", "L3", "L4", MEMORY)
    for row in sorted(rows, key=lambda row: ((*order, row["limit"]).index(row["limit"]), row["D"] > SHORT)):
        length = "" if row["limit"] == "call" else f", D {'>' if row['D'] > SHORT else '<='} {SHORT}"
        groups.setdefault(row["limit"] + length, []).append(row)
    lines = [
        [name, *(_medians([row for row in some if row["kernel"] == kernel], name == "call") for kernel in LABELS)]
        for name, some in groups.items()
    ]
    title = "median of time over floor, hot and cold (rows), by what the floor comes from; of calls their microseconds"
    return f"{title}\n\n{table(lines, ('floor from', *LABELS.values()), markdown)}"


def _medians(rows: list[Row], microseconds: bool) -> str:
    if not rows:
        return MISSING
    hot, cold = (
        statistics.median(row[f"{kind}_us"] / (1.0 if microseconds else row[f"{kind}_floor_us"]) for row in rows)
        for kind in ("hot", "cold")
    )
    return f"{hot:.1f}, {cold:.1f}{' us' if microseconds else ''} ({len(rows)})"


def plot(stored: dict[str, Any], path: Path) -> None:
    """GB/s of the machine and of the kernels' hot calls, against the size of the set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style in zip(KINDS, ("k-", "k--", "k:"), strict=True):
        ax.plot([p["bytes"] for p in stored["curve"]], [p[name] for p in stored["curve"]], style, label=name)
    for index, (kernel, label) in enumerate(LABELS.items()):
        for marker, some in (("o", lambda row: row["B"] <= 4), ("x", lambda row: row["B"] > 4)):
            rows = [row for row in stored["rows"] if row["kernel"] == kernel and some(row)]
            name = label + (", few large samples" if marker == "o" else f", many of {SHORT} elements")
            speeds = [1e-3 * row["bytes"] / row["hot_us"] for row in rows]
            ax.plot([row["set_bytes"] for row in rows], speeds, marker, color=f"C{index}", markersize=4, label=name)
    for name, count in stored["caches"].items():
        ax.axvline(count, color="0.8", zorder=0)
        ax.text(count, 1.0, name, transform=ax.get_xaxis_transform(), ha="right", va="top", color="0.5")
    ax.set(xscale="log", yscale="log", xlabel="working set (bytes)", ylabel="GB/s", title="hot calls, one thread")
    ax.set_ylim(bottom=0.1)
    ax.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def text(stored: dict[str, Any], brief: bool, markdown: bool) -> str:
    curve, caches, rows = stored["curve"], stored["caches"], stored["rows"]
    peak = f"{stored['gflops']:.0f} Gflop/s of multiply-adds"
    if brief:
        return f"{curve_line(curve, caches)}; {peak}.\n{brief_table(rows, markdown)}"
    parts = [curve_table(curve, caches, markdown), peak]
    if rows:
        parts += [kernel_table(rows, markdown), summary(rows, markdown)]
    return "\n\n".join([*parts, f"cold: {size(CLEARED)} read and written before each call"])
