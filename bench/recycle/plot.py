"""Evaluations and products with recycled factors, as a share of those without: a bar a body, the seeds as dots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {"evaluations": "forward: evaluations", "products": "adjoint: products"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of the rows of "training", all bodies and tolerances that are among them.

    Raises:
        ModuleNotFoundError: no matplotlib; it is in the extra "bench".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tolerances = sorted({row["tol"] for row in rows})
    bodies = list(dict.fromkeys(row["body"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(bodies) + 1.5), sharey=True, layout="constrained")
    for axis, (what, title) in zip(axes, TITLES.items(), strict=True):
        for k, tol in enumerate(tolerances):
            mine = [row for row in rows if row["tol"] == tol]
            shares = [[row[what] / row[f"{what} without"] for row in mine if row["body"] == body] for body in bodies]
            at = [i + 0.8 * (k + 0.5) / len(tolerances) - 0.4 for i in range(len(bodies))]
            means = [sum(found) / len(found) if found else 0.0 for found in shares]
            axis.barh(at, means, 0.7 / len(tolerances), label=f"tol {tol:g}", color=f"C{k}")
            dots = [(x, y) for y, found in zip(at, shares, strict=True) for x in found]
            axis.plot(*zip(*dots, strict=True), "k.", markersize=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="share of those without", yticks=range(len(bodies)), yticklabels=bodies)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(tolerances))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
