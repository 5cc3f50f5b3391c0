"""What the constants of recycling are worth: each changed by itself, the pool always in use.

rank    of the shared inverse
ridge   of its least squares
rows    of sums of pairs that a batch gives at most
every   how many steps lie between two batches that are taken in
stored  bfloat16: what the shared inverse holds, rounded to that
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from deq_compile.testing import recycle_pool, recycle_shared, recycle_sketch

from . import training

TOLERANCE, SEED = 1e-4, 0
OTHERS: dict[str, tuple[Any, ...]] = {
    "rank": (4, 8, 32, 64), "ridge": (1e-3, 1e-1), "rows": (16, 32, 128), "every": (3, 30), "stored": ("bfloat16",),
}  # fmt: skip
WHERE: dict[str, tuple[Any, str]] = {
    "rank": (recycle_shared, "RANK"), "ridge": (recycle_shared, "RIDGE"), "rows": (recycle_sketch, "ROWS"),
    "every": (recycle_pool, "FEED_EVERY"), "stored": (recycle_pool, "compress"),
}  # fmt: skip
BODIES = ("mlp", "layernorm", "gru", "prenorm", "mlp-wide", "conv")


def changes() -> list[tuple[str, Any]]:
    """What is changed, and to what; the first is nothing."""
    return [("", None), *((name, value) for name, values in OTHERS.items() for value in values)]


@contextlib.contextmanager
def changed(name: str, value: Any) -> Iterator[None]:
    """A constant of recycling is another meanwhile."""
    if not name:
        yield
        return
    module, constant = WHERE[name]
    with mock.patch.object(module, constant, _rounding(getattr(torch, value)) if name == "stored" else value):
        yield


def _rounding(dtype: torch.dtype) -> Any:
    """`compress`, whose result holds what `dtype` holds of it."""
    compress = recycle_shared.compress

    def rounded(*args: Any) -> Any:
        found = compress(*args)
        if found is None:
            return None
        A, Yt = (part.to(dtype).to(part.dtype) for part in (found.A, found.Yt))
        return recycle_shared.Shared(A, Yt, found.sigma)

    return rounded


def row(body: str, changed_to: str, steps: int | None = None) -> dict[str, Any]:
    """One training of a body with a constant changed: "name=value", or "" for none."""
    name, _, text = changed_to.partition("=")
    value = next((v for n, v in changes() if n == name and str(v) == text), None)
    with changed(name, value):
        found = training.row(body, SEED, TOLERANCE, "always", steps)
    return {**found, "changed_to": changed_to}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change of evaluations and products against those without, a line a change, a column a body."""
    lines = []
    for changed_to in dict.fromkeys(row["changed_to"] for row in rows):
        line: dict[str, Any] = {"changed": changed_to or "nothing"}
        for what in ("evaluations", "products"):
            mine = [row for row in rows if row["changed_to"] == changed_to]
            shares = [row[what] / row[f"{what} without"] - 1 for row in mine]
            line |= {f"{row['body']}, {what[:5]}.": f"{share:+.0%}" for row, share in zip(mine, shares, strict=True)}
            line[f"mean, {what[:5]}."] = f"{sum(shares) / len(shares):+.1%}"
        lines.append(line)
    return lines
