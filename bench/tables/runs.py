"""A run as a list of tasks, each in a process of its own, and the file that finished rows are appended to."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine

from . import measure, memory
from .cases import forms_of
from .methods import all_methods

ROOT = Path(__file__).resolve().parents[2]


def tasks(
    problems: list[str], methods: list[str], forms: list[str] | None, with_memory: bool, with_threads: bool = False
) -> list[dict[str, Any]]:
    """Timing tasks first, one a problem; then the same on all threads, first form only; then memory tasks, one a row."""
    table = all_methods()
    timing: list[dict[str, Any]] = []
    threads: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for problem in problems:
        chosen = [form for form in forms_of(problem) if forms is None or form in forms]
        plan = {form: [key for key in methods if form in table[key].forms] for form in chosen}
        plan = {form: keys for form, keys in plan.items() if keys}
        if plan:
            timing.append({"kind": "timing", "problem": problem, "plan": plan})
        first = next(iter(plan), None)  # memory does not depend much on where x enters: one form will do
        if with_threads and first is not None:
            threads.append({"kind": "threads", "problem": problem, "plan": {first: plan[first]}})
        if with_memory and first is not None:
            rest += [
                {"kind": "memory", "problem": problem, "inject": first, "method": key} for key in plan[first] if table[key].memory
            ]
    return timing + threads + rest


def pending(task: dict[str, Any], done: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The part of a task that has no rows yet; None where there is none left."""
    rows = {(r.get("kind", "timing"), r["problem"], r["inject"], r["method"]) for r in done}
    if task["kind"] == "memory":
        return None if ("memory", task["problem"], task["inject"], task["method"]) in rows else task
    left = {
        form: keys
        for form, keys in task["plan"].items()  # a form again as a whole: its rows are timed together
        if not all((task["kind"], task["problem"], form, key) in rows for key in keys)
    }
    return {**task, "plan": left} if left else None


def child(args: argparse.Namespace) -> int:
    """Do one task; rows go to its file as they are finished."""
    task = json.loads(args.child)
    torch.set_num_threads(args.threads)
    rows: Iterator[dict[str, Any]]
    if task["kind"] == "memory":
        rows = iter([measure.memory_row(task["problem"], task["inject"], task["method"])])
    else:
        # A process of its own: what is compiled for one thread stays with one.
        extra: dict[str, Any] = {}
        if task["kind"] == "threads":
            torch.set_num_threads(machine.usable_cores())
            extra = {"kind": "threads", "threads": torch.get_num_threads()}
        plan = task["plan"]
        found = measure.time_problem(task["problem"], list(plan), plan.__getitem__, args.repeats)
        rows = (row | extra for row in found)
    with open(task["file"], "a") as file:
        for row in rows:
            file.write(json.dumps(row | {"run": task["run"]}) + "\n")
            file.flush()
    return 0


def run_task(args: argparse.Namespace, task: dict[str, Any], command_name: str = "tables", cache: str | None = None) -> None:
    """Do one task in a process of its own; `cache`: a folder of compiled code that several tasks share."""
    command = [sys.executable, "-m", "bench", command_name, "--threads", str(args.threads), "--repeats", str(args.repeats)]
    command += ["--child", json.dumps(task)]
    # An empty cache: a first step shows what it costs, and no code of an earlier version of the package is run.
    with tempfile.TemporaryDirectory(prefix="deq-tables-") as empty:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache or empty}
        if task["kind"] == "memory":
            environment |= memory.ENVIRONMENT
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status:
        print(f"{task['problem']} ({task['kind']}) ended with exit status {status}", file=sys.stderr)


def read_rows(path: Path, run: str) -> list[dict[str, Any]]:
    """Rows of one run; a later row replaces an earlier one of the same name, a torn last line is dropped."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("run") == run:
            found[row.get("kind", "timing"), row["problem"], row["inject"], row["method"]] = row
    return list(found.values())
