"""Shorter views of the derived rows: Markdown for the README, targets, an older run beside a new one, bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from .report import FOOTNOTE, MISSING, UNCONVERGED, Row, grouped, label_of, number, step_ms, title


def markdown(rows: Sequence[Row], labels: dict[str, str], clock: str) -> str:
    """A summary, then a table for each problem and form; the fastest row that converged is in bold."""
    headers = ["", "step (ms)", "against the eager loop", "against TorchDEQ Broyden", "gradient error", "memory (MB)"]
    parts = []
    for group in grouped(rows):
        timed = [row for row in group if clock in row]
        winners = [row for row in timed if row["converged"]]
        best = min(winners, key=lambda row: row[clock]["step_ms"]) if winners else None
        lines = []
        for row in timed:
            mark = f" {UNCONVERGED}" if row["converged"] is False else ""
            step = f"{row[clock]['step_ms']:.1f}"
            lines.append(
                [
                    label_of(row, labels) + mark,
                    f"**{step}**" if row is best else step,
                    number(row["ratio"].get("eager"), ".1f", "×"),
                    number(row["ratio"].get("torchdeq"), ".1f", "×"),
                    MISSING if row["method"] == "bound" else number(row.get("gradient_error"), ".1e"),
                    number(row.get("memory_mb"), ".0f"),
                ]
            )
        alignment = ("left", *["right"] * (len(headers) - 1))
        table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True, colalign=alignment)
        parts.append(f"**{title(group)}**\n\n{table}")
    return "\n\n".join([summary(rows, clock), *parts, FOOTNOTE])


# Columns of the summary: a row's key and its heading.
_SUMMARY = {
    "eager": "eager loop",
    "inductor": "compiled loop",
    "torchdeq-broyden": "TorchDEQ Broyden",
    "torchdeq-fixed": "TorchDEQ fixed-point",
    "deq": "**deq**",
    "deq-peer-tol": "deq, adjoint 1e-4",
    "bound": "bound",
}


def summary(rows: Sequence[Row], clock: str) -> str:
    """One line for each problem and form: step times in ms, deq's ratios, its gradient error."""
    lines = []
    for group in grouped(rows):
        by_method = {row["method"]: row for row in group}
        ours = by_method.get("deq", {})
        first = group[0]
        count = f", N = {first['n_iter']}, x {first['inject']}" if first["n_iter"] else ""
        line = [f"{first['problem']}{count}"]
        for method in _SUMMARY:
            row = by_method.get(method)
            mark = f" {UNCONVERGED}" if row and row.get("converged") is False else ""
            line.append(number(step_ms(row, clock), ".1f") + mark)
        ratio = ours.get("ratio", {})
        line += [number(ratio.get(name), ".1f", "×") for name in ("eager", "torchdeq")]
        lines.append([*line, number(ours.get("gradient_error"), ".1e")])
    headers = ["", *_SUMMARY.values(), "vs eager", "vs TorchDEQ Broyden", "gradient error"]
    alignment = ("left", *["right"] * (len(headers) - 1))
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True, colalign=alignment)


def targets(rows: Sequence[Row], clock: str) -> str:
    """What the rows of deq come to, one line for each problem and form."""
    headers = ["problem", "x", "equal adjoint tol. vs TorchDEQ", "default vs TorchDEQ", "vs best peer", "vs JAX", "vs eager"]
    headers += ["vs compiled", "of bound", "gradient error", "status", "factors in the backward", "step ms", "all threads"]
    headers += ["there vs TorchDEQ"]
    lines = []
    for group in grouped(rows):
        by_method = {row["method"]: row for row in group}
        ours, equal = by_method.get("deq"), by_method.get("deq-peer-tol")
        if ours is None or step_ms(ours, clock) is None:
            continue
        ratio = ours["ratio"]
        lines.append(
            [
                ours["problem"],
                ours["inject"],
                number((equal or {}).get("ratio", {}).get("torchdeq"), ".1f", "×"),
                *(number(ratio.get(name), ".2f", "×") for name in ("torchdeq", "peer", "jax", "eager", "inductor", "bound")),
                number(ours.get("gradient_error"), ".1e"),
                ours.get("status", MISSING),
                MISSING if ours.get("reused") is None else "yes" if ours["reused"] else "no",
                number(step_ms(ours, clock), ".2f"),
                number(ours.get("all_ms"), ".2f"),
                number(ratio.get("all"), ".2f", "×"),
            ]
        )
    note = "step ms and ratios: the clock above; all threads: wall time, in a process of its own"
    return f"{tabulate(lines, headers=headers, disable_numparse=True)}\n{note}"


def compare(new: Sequence[Row], old: Sequence[Row], labels: dict[str, str], clock: str) -> str:
    """Medians of an older run over those of this one: above 1 is faster now.

    The last column divides by what the eager loop did meanwhile, which has not changed: where the two runs are of different
    machines or moments, that is the ratio to look at. Rows that only one of the runs has timed are named below.
    """

    def timed(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
        found = [row for row in rows if row.get("kind", "timing") == "timing" and clock in row]
        return {(row["problem"], row["inject"], row["method"]): row for row in found}

    now, then = timed(new), timed(old)
    ratios = {key: step_ratio(then[key], now[key], clock) for key in now if key in then}
    lines = []
    for (problem, inject, method), ratio in ratios.items():
        before, after = (side[problem, inject, method][clock]["step_ms"] for side in (then, now))
        eager = ratios.get((problem, inject, "eager"))
        label = label_of(now[problem, inject, method], labels)
        against = None if eager is None else ratio / eager
        lines.append([problem, inject, label, f"{before:.2f}", f"{after:.2f}", f"{ratio:.2f}×", number(against, ".2f", "×")])
    headers = ["problem", "x", "row", "old ms", "new ms", "old / new", "the same over eager's"]
    parts = [tabulate(lines, headers=headers, disable_numparse=True) if lines else "no row is in both runs"]
    for what, side, other in (("this run", now, then), ("the older run", then, now)):
        missing: dict[tuple[str, str], list[str]] = {}
        for (problem, inject, _), row in side.items():
            if (problem, inject, row["method"]) not in other:
                missing.setdefault((problem, inject), []).append(label_of(row, labels))
        parts += [f"only in {what}: {problem}, x {inject}: {'; '.join(names)}" for (problem, inject), names in missing.items()]
    return "\n".join(parts)


def step_ratio(then: Row, now: Row, clock: str) -> float:
    return float(then[clock]["step_ms"] / now[clock]["step_ms"])


def plot(rows: Sequence[Row], labels: dict[str, str], clock: str, path: Path) -> None:
    """Bars: how many times faster than the eager loop each row is, hatched where it did not converge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in grouped(rows) if any("eager" in row.get("ratio", {}) for row in group)]
    figure, axes = plt.subplots(len(groups), 1, figsize=(8, 0.6 + 2.6 * len(groups)), layout="constrained", squeeze=False)
    for ax, group in zip(axes[:, 0], groups, strict=True):
        shown = [row for row in group if "eager" in row["ratio"]]
        for place, row in enumerate(reversed(shown)):
            weak = row["converged"] is False
            ours = row["method"].startswith("deq")
            colour = "C0" if ours else "C7" if row["method"] == "bound" else "C1"
            ax.barh(place, row["ratio"]["eager"], color=colour, alpha=0.35 if weak else 1.0, hatch="//" if weak else None)
            ax.text(row["ratio"]["eager"], place, f" {row['ratio']['eager']:.2f}×", va="center", fontsize="x-small")
        names = [label_of(row, labels) for row in reversed(shown)]
        ax.set_yticks(range(len(shown)), names, fontsize="x-small")
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(title(group), fontsize="small")
    axes[-1, 0].set_xlabel("times as fast as the eager loop; hatched: not converged")
    figure.savefig(path, dpi=120)
    plt.close(figure)
