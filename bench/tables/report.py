"""From rows to tables: convergence, ratios, text, Markdown, a comparison with an older run, bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]

RESIDUAL_LIMIT = 1e-4
RESIDUAL_SLACK = 1.01  # the residual is computed once more here, in another order of operations
GRADIENT_LIMIT = 0.05
MISSING = "–"
UNCONVERGED = "†"
FOOTNOTE = (
    f"{UNCONVERGED} not converged (residual above {RESIDUAL_LIMIT:g}, or gradient error above {GRADIENT_LIMIT:g} and above that "
    "of deq's default): no contender."
)


def converged(row: Row, ours: Row | None) -> bool | None:
    """Whether a row solves the problem: residual, and gradient error against ours. None for what has no such claim.

    The bound solves nothing by construction. Where no residual is known (real models), the gradient decides.
    """
    if "gradient_error" not in row or row["method"] == "bound":
        return None
    own = ours.get("gradient_error", 0.0) if ours else 0.0
    limit = max(GRADIENT_LIMIT, own if math.isfinite(own) else 0.0)
    residual = row.get("residual")
    close = residual is None or residual <= RESIDUAL_LIMIT * RESIDUAL_SLACK
    return bool(close and row["gradient_error"] <= limit)  # NaN is not


def step_ms(row: Row | None, clock: str) -> float | None:
    return row[clock]["step_ms"] if row and clock in row else None


def derive(rows: Sequence[Row], kinds: dict[str, str], clock: str) -> list[Row]:
    """Timing rows with memory and all threads (`all_ms`, wall) merged in, `converged`, and `ratio`: others' times over its own.

    `ratio` holds "eager", "inductor", "torchdeq" (Broyden), "peer" (the fastest converged peer in PyTorch, itself excluded),
    "jax" (the fastest converged row in JAX), and "all", TorchDEQ Broyden again in wall time on all threads; "bound" is the
    row's own time over the bound's. Against an unconverged row there is no ratio but that to the user's own loops, which are
    what there is to replace.
    """
    beside: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        found = beside.setdefault((row["problem"], row["inject"], row["method"]), {})
        if row.get("kind") == "memory":
            found |= {name: row[name] for name in ("memory_mb", "memory_first_mb", "first_s") if name in row}
        elif row.get("kind") == "threads" and "wall" in row:
            found |= {"all_ms": row["wall"]["step_ms"], "all_threads": row["threads"]}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("kind", "timing") == "timing":
            merged = {**row, **beside[row["problem"], row["inject"], row["method"]]}
            groups.setdefault((row["problem"], row["inject"]), []).append(merged)
    derived: list[Row] = []
    for group in groups.values():
        by_method = {row["method"]: row for row in group}
        for row in group:
            row["converged"] = converged(row, by_method.get("deq"))
        contenders = {
            kind: [r for r in group if kinds.get(r["method"]) == kind and r["converged"] and clock in r]
            for kind in ("peer", "jax")
        }
        for row in group:
            row["ratio"] = _ratios(row, by_method, contenders, clock)
        derived += group
    return derived


def _ratios(row: Row, by_method: dict[str, Row], contenders: dict[str, list[Row]], clock: str) -> dict[str, float]:
    own = step_ms(row, clock)
    if own is None:
        return {}
    ratio: dict[str, float] = {}
    broyden = by_method.get("torchdeq-broyden")
    fastest = {
        kind: min((r for r in rows if r is not row), key=lambda r: r[clock]["step_ms"], default=None)
        for kind, rows in contenders.items()
    }
    against = {
        "eager": by_method.get("eager"),
        "inductor": by_method.get("inductor"),
        "torchdeq": broyden if broyden and broyden["converged"] else None,
        **fastest,
    }
    for name, other in against.items():
        time = step_ms(other, clock)
        if time is not None:
            ratio[name] = time / own
    if broyden and broyden["converged"] and "all_ms" in broyden and "all_ms" in row:
        ratio["all"] = broyden["all_ms"] / row["all_ms"]
    bound = step_ms(by_method.get("bound"), clock)
    if bound is not None:
        ratio["bound"] = own / bound
    return ratio


def label_of(row: Row, labels: dict[str, str]) -> str:
    return str(labels.get(row["method"], row["method"]))


def number(value: float | None, form: str, after: str = "") -> str:
    return MISSING if value is None else format(value, form) + after


def title(group: Sequence[Row]) -> str:
    first = group[0]
    loop = f"loop of {first['n_iter']}" if first["n_iter"] else "its own loop"
    where = {"before": "x enters before it", "inside": "x enters inside it"}.get(first["inject"], "as written")
    return f"{first['problem']}: {loop}, {where}"


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["inject"]), []).append(row)
    return list(groups.values())


def text_tables(rows: Sequence[Row], labels: dict[str, str], clock: str) -> str:
    """All columns, one table for each problem and form."""
    other = "wall" if clock == "cpu" else "cpu"
    headers = [
        "",
        f"step ms ({clock})",
        "quartiles",
        "forward",
        "backward",
        f"{other} ms",
        "all threads",
        "iterations",
        "VJPs",
        "residual",
    ]
    headers += ["gradient error", "value error", "status", "first s", "MB", "vs eager", "vs TorchDEQ", "vs best peer", "of bound"]
    parts = []
    for group in grouped(rows):
        lines, notes = [], []
        for row in group:
            label = label_of(row, labels)
            if clock not in row:
                notes.append(f"  {label}: {row.get('skipped', 'not timed')}")
                continue
            times, ratio = row[clock], row["ratio"]
            lines.append(
                [
                    label + ("" if row["converged"] is not False else f" {UNCONVERGED}"),
                    f"{times['step_ms']:.2f}",
                    "–".join(f"{q:.2f}" for q in times["quartiles_ms"]),
                    f"{times['forward_ms']:.2f}",
                    f"{times['backward_ms']:.2f}",
                    number(step_ms(row, other), ".2f"),
                    number(row.get("all_ms"), ".2f"),
                    number(row.get("iterations"), ".3g"),
                    number(row.get("vjps"), "d"),
                    *(number(row.get(n), ".1e") for n in ("residual", "gradient_error", "value_error")),
                    row.get("status", MISSING),
                    number(row.get("first_s"), ".1f"),
                    number(row.get("memory_mb"), ".0f"),
                    *(number(ratio.get(n), ".2f", "×") for n in ("eager", "torchdeq", "peer", "bound")),
                ]
            )
        table = tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))
        parts.append("\n".join([title(group), table, *notes]))
    return "\n\n".join([*parts, FOOTNOTE])
