"""Views of the gradient study, the language model, the study of several fixed points, recycling and public models."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from bench.gradients.report import ratios_by_body
from bench.language.cli import ratios as language_ratios
from bench.reach import table as reach_table

from .sources import Row, read
from .text import markdown, span

MODES = {
    "jfb": '`backward="jfb"` (Jacobian-free)',
    "raw": "raw reuse, `backward_tol=inf` (Nguyen & Mauch; SHINE)",
    "phantom-5": '`backward="phantom"` (5 steps, damping 0.5)',
    "reuse<1e-1": "reuse, `backward_tol=1e-1`",
    "reuse<1e-2": "**reuse, `backward_tol=1e-2` (default)**",
    "exact": '`backward="exact"` (1e-6)',
}

FORMS = {"products": ".0f", "cosine": ".4f", "error": ".1g"}  # of the table of modes


def modes(name: str = "gradients", tol: float = 1e-4) -> str:
    """One line a mode, ranges over the bodies of seed 0: products, cosine with the exact gradient, relative error."""
    rows = [row for row in read(name)["quality"] if row["seed"] == 0 and row["tol"] == tol]
    lines = []
    for mode, label in MODES.items():
        mine = [row for row in rows if row["mode"] == mode]
        if mine:
            spans = (span([row[what] for row in mine], form) for what, form in FORMS.items())
            lines.append([label, *spans])
    return markdown(["mode", "products", "cosine", "relative error"], lines)


def training(name: str = "gradients", modes: Mapping[str, str] = MODES) -> str:
    """One line a mode: accuracy on both tasks (mean and standard deviation over seeds), products a step."""
    rows = read(name)["training"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for mode, label in modes.items():
        line = [label]
        for task in tasks:
            mine = [row for row in rows if row["mode"] == mode and row["task"] == task]
            accuracy = [row["accuracy"] for row in mine]
            line += [f"{mean(accuracy):.2f} ± {stdev(accuracy):.2f}", f"{mean(row['products'] for row in mine):.1f}"]
        lines.append(line)
    heads = list(itertools.chain.from_iterable((f"{task}: accuracy", "products") for task in tasks))
    return markdown(["mode", *heads], lines)


def seeds(name: str = "gradients") -> int:
    return len({row["seed"] for row in read(name)["training"]})


def saved(name: str = "gradients", tol: float = 1e-4, to: str = "1e-2") -> dict[str, float]:
    """Share of the products that the factors save against the same iteration without: mean, least and most of the bodies."""
    found = [1 - ratio for ratio in ratios_by_body([row for row in read(name)["quality"] if row["tol"] == tol], to).values()]
    return {"mean": mean(found), "least": min(found), "most": max(found)}


def language(name: str) -> str:
    """One line a case: how many times as fast as stock Inductor, at defaults and at equal gradient error."""
    keys = ("gate", "gradient")
    spoken = {"ift": "plain iteration to 3e-4", "anderson": "Anderson, ridge 1e-4", "onestep": "one step"}
    lines = []
    for case, group in itertools.groupby(read(name)["rows"], key=lambda row: [row[key] for key in keys]):
        rows = list(group)
        found = language_ratios(rows)
        lines.append(
            [
                f"{rows[0]['iterations']} iterations, {spoken[case[1]]}",
                f"{found['as it is']:.2f}×",
                f"{found['at equal error']:.2f}×",
            ]
        )
    return markdown(["the user's loop and its backward", "at the defaults", "at equal gradient error"], lines)


def several(name: str = "multistable") -> dict[str, int]:
    """Bodies with several fixed points: how many cases, batches and wrong ones; and how many with one were not taken for such."""
    found = read(name)
    rows: list[Row] = found["rows"]
    return {
        "bodies": len({row["body"] for row in rows}),
        "batches": sum(row["batches"] for row in rows),
        "wrong": sum(row["wrong batches"] for row in rows),
        "honest": len(found["honest"]),
        "followed": sum(row["status"] == "follow" for row in found["honest"]),
    }


def reach(name: str = "reach") -> dict[str, int]:
    """Counts of the public models."""
    rows = [row for row in read(name)["rows"] if "deq" in row]
    kept = [row for row in rows if not reach_table.replaced(row) and row["deq"].get("regions")]
    return {
        "models": len(rows),
        "repositories": len({row["repository"] for row in rows}),
        "replaced": sum(map(reach_table.replaced, rows)),
        "kept": len(kept),
        "wrong": sum(map(reach_table.wrong, rows)),
        "crashed": sum(map(reach_table.crashed, rows)),
        "slower": sum(map(reach_table.slower, rows)),
    }


def reach_best(name: str = "reach", most: int = 8) -> str:
    """The models with a region whose step gains most, by the ratio to Inductor's step."""
    rows = [row for row in read(name)["rows"] if "deq" in row and reach_table.replaced(row)]
    ranked: list[tuple[float, Any]] = sorted((reach_table.ratio(row, "step_ms") or 9.0, row["name"], row) for row in rows)  # type: ignore[misc]
    lines = []
    for _, _, row in ranked[:most]:  # type: ignore[misc]
        steps = [f"{row[way]['step_ms']:.1f}" for way in ("eager", "inductor", "deq")]
        error = row["deq"]["error"]
        lines.append([row["name"], row["iteration"], *steps, f"{error['value']:.0e}", f"{error['gradient']:.0e}"])
    return markdown(["model", "how it iterates", "eager (ms)", "Inductor", "deq", "value error", "gradient error"], lines)
