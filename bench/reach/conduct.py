"""The parent's side: the processes of one model, their turns, and the row that comes of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.tables.runs import ROOT

from .child import KINDS
from .manifest import Model
from .ways import WAYS, Row

WARM = 10  # steps before the clock: regions are compared at calls 0, 1, 2, 4 and 8, and then not before the 200th
TURNS, SECONDS_OF_TURNS, FEWEST_TURNS = 11, 20.0, 3


class Failed(Exception):
    """A process ended or took too long; the message is what the table shows."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The same for all models of a run: folder of clones, module of drivers, Inductor's shared cache, seconds for one answer."""

    folder: Path
    drivers: str
    cache: str
    limit: float


class Process:
    """A child, asked by name. It is ended when its time is up."""

    def __init__(self, model: Model, kind: str, plan: Plan, out: Path) -> None:
        task = {
            "model": model.name,
            "kind": kind,
            "sources": str(plan.folder),
            "out": str(out),
            "drivers": plan.drivers,
            "warm": WARM,
        }
        command = [sys.executable, "-m", "bench", "reach", "--child", json.dumps(task)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": plan.cache,
        }
        self.log = open(out / f"{kind}.log", "w")  # noqa: SIM115 (it lives as long as the child)
        self.limit = plan.limit
        self.end = time.monotonic() + plan.limit
        self.child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.hello = self.answer()

    def ask(self, what: str) -> Row:
        """The answer to a question. A child that fails is closed, and `Failed` says how it failed."""
        assert self.child.stdin is not None
        self.end = time.monotonic() + self.limit  # it may have waited for the others before
        try:
            self.child.stdin.write(what + "\n")
            self.child.stdin.flush()
        except (OSError, ValueError):
            self.close()
            raise Failed(f"the process had ended before {what!r}") from None
        return self.answer()

    def answer(self) -> Row:
        assert self.child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.child.stdout, selectors.EVENT_READ)
            in_time = bool(selector.select(max(0.0, self.end - time.monotonic())))
        line = self.child.stdout.readline() if in_time else ""
        row: Row = json.loads(line) if line else {}
        if not line:
            row = {"error": f"the process died with exit status {self.child.wait()}"} if in_time else {"error": self.overdue()}
        if "error" in row:
            self.close()
            raise Failed(row["error"])
        return row

    def overdue(self) -> str:
        return f"longer than {self.limit:.0f} s"

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        for end in (self.child.stdin, self.child.stdout, self.log):
            if end is not None:
                with contextlib.suppress(BrokenPipeError):
                    end.close()


def relative_error(found: dict[str, Any], truth: dict[str, Any]) -> Row:
    """|a - b| / |b| of the value and of all gradients together, in float64, and of the worst single gradient that counts."""

    def norm(tensors: list[torch.Tensor]) -> float:
        return float(torch.sqrt(sum((t.double() ** 2).sum() for t in tensors) + torch.zeros((), dtype=torch.float64)))

    value, right = found["value"].double(), truth["value"].double()
    gradients, expected = found["gradients"], truth["gradients"]
    off = {n: norm([gradients[n].double() - g.double()]) if n in gradients else norm([g]) for n, g in expected.items()}
    size = norm(list(expected.values()))
    worst = max((off[n] / norm([g]) for n, g in expected.items() if norm([g]) > 1e-3 * size), default=0.0)
    return {
        "value": norm([value - right]) / max(norm([right]), 1e-30),
        "gradient": sum(d * d for d in off.values()) ** 0.5 / max(size, 1e-30),
        "worst": worst,
    }


def compare(out: Path, row: Row) -> None:
    """Errors against the truth, and deq's last step against eager's, where both are there."""

    def load(name: str) -> dict[str, Any] | None:
        file = out / f"{name}.pt"
        return torch.load(file) if file.exists() else None

    truth = load("truth-first") or load("eager-first")
    for way in WAYS:
        found = load(f"{way}-first")
        if found is not None and truth is not None:
            row[way]["error"] = relative_error(found, truth)
        later, eager = load(f"{way}-last"), load("eager-last")
        if later is not None and eager is not None:
            row[way]["later"] = relative_error(later, eager)


def turns(processes: dict[str, Process], row: Row, fail: Any) -> None:
    """Untimed steps, then timed ones in turns, so that a slow moment of the machine falls on all."""
    for way in list(processes):
        fail(way, lambda way=way: row[way].update(processes[way].ask("steps")))
    samples: dict[str, list[float]] = {way: [] for way in processes}
    begun = time.monotonic()
    for done in range(TURNS):
        if done >= FEWEST_TURNS and time.monotonic() - begun > SECONDS_OF_TURNS:
            break
        for way in list(processes):
            fail(way, lambda way=way: samples[way].append(processes[way].ask("turn")["ms"]))
    for way in list(processes):
        fail(way, lambda way=way: row[way].update(processes[way].ask("last")))
        if samples[way]:
            row[way] |= {"step_ms": statistics.median(samples[way]), "turns": len(samples[way])}
            row[way]["quartiles_ms"] = list(machine.quartiles(samples[way])) if len(samples[way]) > 1 else []


def measure(model: Model, plan: Plan, out: Path) -> Row:
    """The row of one model."""
    row: Row = {"name": model.name, "repository": model.repository, "commit": model.commit, "licence": model.licence}
    row |= {"iteration": model.iteration, **{kind: {} for kind in KINDS}}
    processes: dict[str, Process] = {}

    def fail(kind: str, act: Any) -> None:
        try:
            act()
        except Failed as error:
            row[kind]["failed"] = str(error)
            if kind in processes:
                processes.pop(kind).close()

    def start(kind: str, question: str) -> None:
        processes[kind] = process = Process(model, kind, plan, out)
        row["version"] = process.hello["version"]
        row[kind].update(process.ask(question))

    try:
        for kind in KINDS:
            fail(kind, lambda kind=kind: start(kind, "explain" if kind == "explain" else "first"))
            if kind not in WAYS and kind in processes:
                processes.pop(kind).close()
        turns(processes, row, fail)
    finally:
        for process in processes.values():
            process.close()
    compare(out, row)
    return row
