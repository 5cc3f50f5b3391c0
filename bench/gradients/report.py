"""Tables and plot of the gradient study."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from tabulate import tabulate

from .modes import DEFAULT, MODES

Rows = list[dict[str, Any]]


def present(found: dict[str, Any], plot: Path | None) -> None:
    quality, training = found["quality"], found["training"]
    print(f"{found['date'][:10]}, commit {found['commit'] or 'unknown'}, torch {found['torch']}")
    if quality:
        for tol in sorted({row["tol"] for row in quality}, reverse=True):
            print(f"\nforward tolerance {tol:g}: cosine / relative error of the parameter gradient / products (means over seeds)")
            print(by_body([row for row in quality if row["tol"] == tol]))
        for tol in sorted({row["tol"] for row in quality} & {1e-3, 1e-4}, reverse=True):
            print(f"\nproducts of reuse over products without it, same iteration, forward tolerance {tol:g}")
            print(ratios([row for row in quality if row["tol"] == tol]))
        print(f"\nthe default, {DEFAULT}, at forward tolerance 1e-4 or the nearest measured")
        print(at_default(quality))
    if training:
        print("\ntraining: accuracy (mean and standard deviation over seeds), products and CPU time")
        print(trainings(training))
    if plot:
        draw(quality, training, plot)


def by_body(rows: Rows) -> str:
    bodies = list(dict.fromkeys(row["body"] for row in rows))
    lines = []
    for mode in MODES:
        line = [mode]
        for body in bodies:
            some = [row for row in rows if row["mode"] == mode and row["body"] == body]
            means = [mean(r[what] for r in some) for what in ("cosine", "error", "products")] if some else []
            line.append("{:.3f} / {:.2g} / {:.1f}".format(*means) if some else "–")
        lines.append(line)
    return tabulate(lines, headers=["mode", *bodies])


def ratios_by_body(rows: Rows, tol: str) -> dict[str, float]:
    """Products of reuse over products without it, the same iteration to ``tol`` ("1e-1" or "1e-2"), means over seeds."""
    return {body: ours / others for body, (ours, others) in _products(rows, tol).items()}


def _products(rows: Rows, tol: str) -> dict[str, tuple[float, float]]:
    found = {}
    for body in dict.fromkeys(row["body"] for row in rows):
        pairs = [
            (row["products"], other["products"])
            for row in rows
            for other in rows
            if row["body"] == other["body"] == body and row["seed"] == other["seed"]
            if row["mode"] == f"reuse<{tol}" and other["mode"] == f"none<{tol}"
        ]
        found[body] = (mean(a for a, _ in pairs), mean(b for _, b in pairs))
    return found


def ratios(rows: Rows) -> str:
    every = {tol: _products(rows, tol) for tol in ("1e-1", "1e-2")}
    lines: list[list[str]] = []
    for body in every["1e-2"]:
        pairs = (found[body] for found in every.values())
        lines.append([body, *(f"{ours:.1f} / {others:.1f} = {ours / others:.2f}" for ours, others in pairs)])
    lines.append(["mean", *(f"{mean(a / b for a, b in found.values()):.3f}" for found in every.values())])
    return tabulate(lines, headers=["body", "to 1e-1", "to 1e-2"])


def at_default(rows: Rows) -> str:
    tol = min({row["tol"] for row in rows}, key=lambda t: abs(t - 1e-4))
    lines = [
        [r["body"], r["seed"], r["cosine"], r["error"], r["error_here"], r["w_cosine"], r["w_cosine_here"], r["residual"],
         r["products"], r["samples"], r["radius"]]
        for r in rows if r["mode"] == DEFAULT and r["tol"] == tol
    ]  # fmt: skip
    names = ["body", "seed", "cosine", "error", "… at z_k", "cosine of w", "… at z_k", "residual"]
    names += ["products", "samples", "radius"]
    return tabulate(lines, headers=names, floatfmt=".4g")


def trainings(rows: Rows) -> str:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            some = [row for row in rows if row["task"] == task and row["mode"] == mode]
            if not some:
                continue
            accuracy = [row["accuracy"] for row in some]
            spread = stdev(accuracy) if len(accuracy) > 1 else 0.0
            lines.append([
                task, mode, len(some), f"{mean(accuracy):.3f} ± {spread:.3f}", f"{min(accuracy):.2f}",
                f"{mean(r['products'] for r in some):.1f}", f"{median(r['backward_seconds'] for r in some):.1f}",
                f"{median(r['seconds'] for r in some):.1f}", f"{mean(r['iterations'] for r in some):.1f}",
                f"{mean(r['converged'] for r in some):.2f}",
            ])  # fmt: skip
    names = ["task", "mode", "seeds", "accuracy", "worst", "products", "backward (s)", "training (s)", "iterations", "converged"]
    return tabulate(lines, headers=names)


def draw(quality: Rows, training: Rows, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    rows = [row for row in quality if row["tol"] == 1e-3 and row["seed"] == 0]
    for body in dict.fromkeys(row["body"] for row in rows):
        some = sorted(
            (row["products"], row["error_here"]) for row in rows if row["body"] == body and row["mode"].startswith("reuse")
        )
        left.plot(*zip(*some, strict=True), marker="o", markersize=3, label=body)
    left.set(xlabel="products", ylabel="error of the parameter gradient at z_k", yscale="log", title="reuse, forward to 1e-3")
    left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines, not on them
    modes, names = list(dict.fromkeys(row["mode"] for row in training)), list(dict.fromkeys(row["task"] for row in training))
    for k, task in enumerate(names):
        for j, mode in enumerate(modes):
            accuracy = [row["accuracy"] for row in training if row["task"] == task and row["mode"] == mode]
            right.plot([j + 0.2 * k] * len(accuracy), accuracy, ".", color=f"C{k}", label=task if j == 0 else None)
    right.set(ylabel="test accuracy", title="trained with each mode, one point a seed")
    right.set_xticks(range(len(modes)), modes, rotation=20)
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
