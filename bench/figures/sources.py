"""The committed results, by file name."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]


@functools.cache
def read(name: str) -> Row:
    """What ``bench/results/<name>.json`` holds.

    Raises:
        FileNotFoundError: no such file; the message lists those that there are.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(found.stem for found in RESULTS.glob("*.json")))
        raise FileNotFoundError(f"results: expected one of {known}; got {name!r}")
    found: Row = json.loads(path.read_text())
    return found


def day(name: str) -> str:
    """The day of a run, as in "28 November 2026"."""
    import datetime

    date = datetime.date.fromisoformat(read(name)["date"][:10])
    return f"{date.day} {date:%B %Y}"


def conditions(name: str) -> str:
    """Machine, threads, versions and day of a run, in one line."""
    found = read(name)
    machine = found["machine"]
    threads = ", ".join(f"{machine[what]} {what if machine[what] > 1 else what[:-1]}" for what in ("threads", "cores"))
    return f"{machine['cpu']}, {threads}, Python {machine['python']}, torch {machine['torch']}, {day(name)}"


def link(name: str) -> str:
    """A link to the file, from the README."""
    return f"[{name}.json](bench/results/{name}.json)"


def download(name: str) -> str:
    """The same from a page of the site, which takes the file along."""
    return f"{{download}}`{name}.json <../bench/results/{name}.json>`"
