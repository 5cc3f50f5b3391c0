"""From records to rows: one row a region for the steps that it sums up."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..region.records import SolveRecord


@dataclasses.dataclass
class Row:
    """What one region did in some steps. Every number but the counts is None where no record has it.

    step            number of the last step that the row sums up; `steps` how many those are
    region          where the region is, `file.py:line`; regions at one line are numbered: `file.py:line (2)`
    key             its key, as in records and reports
    verdict         what was done most often: "solve", "follow" or "kept"
    solves          calls of the region
    solve, follow, kept  their shares, 0 to 1
    iterations      evaluations of the body until a sample stopped, mean; `iterations_max` the largest
    residual        stopping residual, max over samples and calls; `residual_mean` the mean. Not of kept loops, which have none
    converged       share of samples that reached the tolerance, mean over calls that were not kept
    vjps            vector-Jacobian products of a backward, mean
    adjoint_residual        |q + J^T w - w| / |q|, max over samples and calls; `adjoint_residual_mean` the mean
    adjoint_error   estimate of |w - w*| / |w|, mean
    gradient_error  relative error of the operands' gradients when it was last measured
    """

    step: int
    steps: int
    region: str
    key: str
    verdict: str
    solves: int
    solve: float
    follow: float
    kept: float
    iterations: float | None
    iterations_max: int | None
    residual: float | None
    residual_mean: float | None
    converged: float | None
    vjps: float | None
    adjoint_residual: float | None
    adjoint_residual_mean: float | None
    adjoint_error: float | None
    gradient_error: float | None


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
"""The names of a row's entries, in order: those of `Row`."""
WORDS = ("region", "key", "verdict")  # entries that are no numbers


class Names:
    """A readable name for every region: its file and line, numbered where several are at one. A name once given stays."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: Counter[str] = Counter()

    def of(self, record: SolveRecord) -> str:
        key = record.region
        if key not in self._names:
            known = record.where not in ("", "<unknown>")
            place = record.where.replace("\\", "/").rpartition("/")[2] if known else key
            self._taken[place] += 1
            self._names[key] = place if self._taken[place] == 1 else f"{place} ({self._taken[place]})"
        return self._names[key]


def rows_of(records: Iterable[SolveRecord], step: int = 0, steps: int = 1, names: Names | None = None) -> list[dict[str, Any]]:
    """Sum up the records of some steps: one row, a dict with the entries of `COLUMNS`, for each region, in order of its first
    call. A record whose backward has not run counts in the forward's numbers only."""
    names = names or Names()
    by_region: dict[str, list[SolveRecord]] = {}
    for record in records:
        by_region.setdefault(record.region, []).append(record)
    return [dataclasses.asdict(_row(key, found, step, steps, names)) for key, found in by_region.items()]


def _row(key: str, records: list[SolveRecord], step: int, steps: int, names: Names) -> Row:
    statuses = Counter(record.status for record in records)
    share = {status: count / len(records) for status, count in statuses.items()}
    solved = [record for record in records if record.status != "kept"]
    return Row(
        step=step,
        steps=steps,
        region=names.of(records[0]),
        key=key,
        verdict=statuses.most_common(1)[0][0],
        solves=len(records),
        solve=share.get("solve", 0.0),
        follow=share.get("follow", 0.0),
        kept=share.get("kept", 0.0),
        iterations=_mean(records, "iterations"),
        iterations_max=max(record.iterations_max for record in records),
        residual=_largest(solved, "residual"),
        residual_mean=_mean(solved, "residual_mean"),
        converged=_mean(solved, "converged"),
        vjps=_mean(records, "vjps"),
        adjoint_residual=_largest(records, "adjoint_residual"),
        adjoint_residual_mean=_mean(records, "adjoint_residual_mean"),
        adjoint_error=_mean(records, "adjoint_error"),
        gradient_error=next(reversed(_values(records, "gradient_error")), None),
    )


def _values(records: list[SolveRecord], name: str) -> list[float]:
    return [float(value) for record in records if (value := getattr(record, name)) is not None]


def _mean(records: list[SolveRecord], name: str) -> float | None:
    found = _values(records, name)
    return sum(found) / len(found) if found else None


def _largest(records: list[SolveRecord], name: str) -> float | None:
    """A NaN is larger than all: it must not get lost."""
    return max(_values(records, name), key=lambda value: (math.isnan(value), value), default=None)
