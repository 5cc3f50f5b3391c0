"""One process of a model: it makes the case, and does what its parent asks for, one JSON line each way."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

from deq_compile import Region, Report, explain

from . import sources, ways
from .manifest import Case, Model, models_of
from .ways import Row, Step

KINDS = ("truth", *ways.WAYS, "explain")


def made(model: Model, tight: bool) -> Case:
    torch.manual_seed(0)
    return model.build(tight)


def shown(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def relative(text: str, folder: str) -> str:
    """A text on one line, its files named as they stand in the repository or in the package."""
    for base in (folder, *sys.path):
        text = text.replace(str(base).rstrip("/") + "/", "") if base else text
    return " ".join(text.split())


class Child:
    """What a process can be asked for; every answer is a row of figures."""

    def __init__(self, task: Row, model: Model) -> None:
        self.task, self.model, self.kind = task, model, task["kind"]
        self.folder = Path(task["out"])
        self.report = Report()
        self.step: Step | None = None

    def relative(self, text: str) -> str:
        return relative(text, self.task["sources"])

    def first(self) -> Row:
        """The first step: compilation, value, gradients. What it returned goes to a file."""
        double = self.kind == "truth" and self.model.double
        case = made(self.model, tight=self.kind == "truth")
        case = ways.in_float64(case) if double else case
        way = "eager" if self.kind == "truth" else self.kind
        self.step = Step(case, ways.compiled(case, way, self.report))
        begun, value = time.perf_counter(), list[torch.Tensor]()
        _, cpu = ways.timed(lambda: value.append(self.step.run()))  # type: ignore[union-attr]
        self.save("first", value[0])
        return {"first_cpu_s": cpu, "first_wall_s": time.perf_counter() - begun, "float64": double, **ways.graphs()}

    def save(self, when: str, value: torch.Tensor) -> None:
        assert self.step is not None
        torch.save({"value": value, "gradients": self.step.gradients()}, self.folder / f"{self.kind}-{when}.pt")

    def steps(self) -> Row:
        """Some steps that nobody times, until compilation and comparisons are over."""
        step = self.step
        assert step is not None

        def warm() -> None:
            for _ in range(self.task["warm"]):
                step.run()

        _, cpu = ways.timed(warm)  # compilers that start later than in the first step included
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"warm_cpu_s": cpu, **ways.graphs()}

    def turn(self) -> Row:
        """Two steps, of which the second is timed: in training a step follows one of its own kind."""
        assert self.step is not None
        self.step.run()
        own, _ = ways.timed(self.step.run)
        return {"ms": 1e3 * own}

    def last(self) -> Row:
        assert self.step is not None
        self.save("last", self.step.run())
        return {**ways.graphs(), "regions": [self.told(region) for region in self.report.regions]}

    def told(self, region: Region) -> Row:
        notes = [self.relative(note) for note in region.notes]
        return {"status": region.status, "kind": region.kind, "where": self.relative(str(region.location)), "notes": notes}

    def explained(self) -> Row:
        """What `explain` says, in training as the step is; the bodies uncompiled, since this is about what is found."""
        case = made(self.model, tight=False)
        report = explain(case.model, inner="eager")(*case.args)
        return {
            "explained": [f"{r.status} {r.kind} {self.relative(str(r.location))}" for r in report.regions],
            "reasons": [self.relative(str(skipped)) for skipped in report.skipped],
            "graph_breaks": [self.relative(text)[:300] for text in report.graph_breaks],
        }


def answers(child: Child) -> dict[str, Callable[[], Row]]:
    return {"first": child.first, "steps": child.steps, "turn": child.turn, "last": child.last, "explain": child.explained}


def serve(task: Row, requests: TextIO, replies: TextIO) -> None:
    """Answer until the parent closes its end. An exception is an answer as well, and the last one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def reply(row: Row) -> None:
        replies.write(json.dumps(row) + "\n")
        replies.flush()

    with tempfile.TemporaryDirectory(prefix="deq-reach-") as cold:
        try:
            model = next(model for model in models_of(task["drivers"]) if model.name == task["model"])
            sources.enter(model, Path(task["sources"]))
            sources.restore_old_names()
            if task["kind"] in ("inductor", "deq"):
                ways.warm_up(task["kind"])  # in the cache that all models share
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cold
            child = Child(task, model)
            version = metadata.version(model.package) if model.package else ""
            reply({"ready": True, "version": version})
            for line in requests:
                reply(answers(child)[line.strip()]())
        except Exception as error:
            traceback.print_exc()
            reply({"error": relative(shown(error), task["sources"])})


def main(text: str) -> int:
    """What a model prints goes to standard error: standard output is the line to the parent."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(text), sys.stdin, replies)
    replies.close()
    os._exit(0)  # whatever a model has started in the background ends here
