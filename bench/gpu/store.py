"""The results: one JSON file, written anew after every row, so that what is cut off leaves its rows; and merging of files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Store:
    """A file of runs and rows. A run is one start of `bench gpu`; each row names its run, part and group.

    Processes may write at the same time (compiling in parallel does): a lock beside the file orders them, and the file is
    replaced as a whole, so that a reader never sees half of it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"runs": [], "rows": []}
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.read()
            yield content
            fresh = self.file.with_suffix(".tmp")
            fresh.write_text(json.dumps(content, indent=1, default=str) + "\n")
            os.replace(fresh, self.file)

    def begin(self, **about: Any) -> int:
        """A new run; returns its number."""
        with self._changed() as content:
            content["runs"].append({"begun": time.strftime("%Y-%m-%d %H:%M:%S"), **about})
            return len(content["runs"]) - 1

    def add(self, row: Row) -> None:
        with self._changed() as content:
            content["rows"].append(row)


@dataclass(frozen=True)
class Results:
    """Rows of one device, from one file or several.

    facts   the row that describes the device and the versions; empty where no run came that far
    rows    of each group those of its last run
    others  names of other devices that the files hold rows of, which are left out
    """

    facts: Row
    rows: list[Row]
    others: list[str]

    @property
    def rehearsed(self) -> bool:
        """Whether there was no device: every time is the interpreter's then, and says nothing."""
        return bool(self.facts.get("rehearsed"))

    @property
    def failed(self) -> list[str]:
        """Groups that did not come to their end, and how."""
        return [f"{label(r)}: {r['outcome']}" for r in self.rows if r["what"] == "outcome" and r["outcome"]]

    @property
    def wrong(self) -> list[Row]:
        return [r for r in self.rows if bad(r)]


def label(row: Row) -> str:
    return f"{row['part']}.{row['group']}" if row.get("group") else str(row["part"])


def bad(row: Row) -> bool:
    """Whether a row says that something of ours is wrong. A peer that fails is only told."""
    return "error" in row or row.get("ok") is False


def merged(contents: Sequence[dict[str, Any]]) -> Results:
    """Merge files, the later ones counting as later: a group that ran again replaces its earlier rows.

    Rows of several devices, or of several versions of torch or Triton, never stand in one table: the device and versions of the
    last run win.
    """
    rows: list[Row] = []
    facts: dict[int, Row] = {}
    offset = 0
    for content in contents:
        for row in content["rows"]:
            run = row.get("run", 0) + offset
            rows.append({**row, "run": run})
            if row["what"] == "device":
                facts[run] = row
        offset += len(content["runs"])
    last = facts[max(facts)] if facts else {}

    def same(run: int) -> bool:
        return _identity(facts.get(run, {})) == _identity(last)

    ours = [r for r in rows if same(r["run"])]
    newest: dict[str, int] = {}
    for row in ours:
        newest[label(row)] = max(newest.get(label(row), 0), row["run"])
    others = {str(f.get("device", "unknown")) for run, f in facts.items() if not same(run)}
    return Results(last, [r for r in ours if r["run"] == newest[label(r)]], sorted(others))


def _identity(facts: Row) -> tuple[Any, ...]:
    return tuple(facts.get(name) for name in ("device", "torch", "triton"))
