"""Compile ahead, in many processes at once, what the groups of a call will launch: Triton's and Inductor's caches are on disk.

Tasks call the very functions of the parts, with a setting that writes no rows and times nothing: what they launch is then
compiled for exactly the specialisations that are launched later. A task that fails is told, and fails again where it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .clocks import Timing, Work
from .common import Setting


class Quiet(Setting):
    """Runs once what others time, and writes nothing."""

    def row(self, what: str, **values: Any) -> None: ...

    def timed(self, work: Work, reset: Work | None = None, repeats: int = 9) -> Timing:
        if reset is not None:
            reset()
        work()
        self.sync()
        return Timing(1.0, 1.0, True)

    def wall_us(self, work: Work, reset: Work | None = None, repeats: int = 9) -> float:
        return self.timed(work, reset).device

    def host_us(self, work: Work, calls: int = 20, repeats: int = 5) -> float:
        return self.timed(work).device


@dataclass(frozen=True)
class Task:
    """weight: about how many seconds it takes; the heavy ones begin first."""

    name: str
    weight: float
    run: Callable[[Setting], object]


def tasks(labels: set[str], dry: bool) -> list[Task]:
    """What the groups with these labels need, the heaviest first."""
    found = [task for label in sorted(labels) for task in _tasks_of(label, dry)]
    return sorted(found, key=lambda task: (-task.weight, task.name))


def _tasks_of(label: str, dry: bool) -> Iterator[Task]:
    if label.startswith("steps."):
        name = label.partition(".")[2]
        yield from (Task(f"{label} {way}", 45, partial(step, name=name, label=way)) for way in _ways(dry))
    elif label in _CASES:
        for name, weight, work in _CASES[label](dry):
            yield Task(f"{label} {name}", weight, work)


Cases = Iterator[tuple[str, float, Callable[..., object]]]


def _kernel_cases(dry: bool) -> Cases:
    from . import correct

    for B, D in [(2, 17)] if dry else correct.SHAPES:
        for dtype in correct.DTYPES:
            yield f"{B}x{D} {dtype}", 12, partial(correct.kernel_case, B=B, D=D, name=dtype)


def _adjoint_cases(dry: bool) -> Cases:
    from . import correct

    for B, D in [(2, 17)] if dry else correct.ADJOINT_SHAPES:
        yield f"{B}x{D}", 15, partial(correct.adjoint_case, B=B, D=D)


def _model_cases(dry: bool) -> Cases:
    from . import models

    for name, make in models.chosen(dry).items():
        yield name, 40, partial(check_model, name=name, make=make)


def _solve_cases(dry: bool) -> Cases:
    from . import solves

    for B, D in [(2, 17)] if dry else solves.SHAPES:
        yield f"{B}x{D}", 10, partial(solves.one_solve, B=B, D=D, wanted="while", bandwidth=1.0)


def _timed_cases(dry: bool) -> Cases:
    from . import kernel_times

    for case in kernel_times.cases(dry):
        yield str(case), 15, partial(kernel_times.one_shape, bandwidth=1.0, case=case)


_CASES: dict[str, Callable[[bool], Cases]] = {
    "correct.kernels": _kernel_cases,
    "correct.adjoints": _adjoint_cases,
    "correct.models": _model_cases,
    "experiments": _solve_cases,
    "kernels": _timed_cases,
}


def check_model(setting: Setting, name: str, make: Callable[[], Any]) -> None:
    """A model through all engines, as the part does."""
    from . import models

    models.check(setting, name, make())


def _ways(dry: bool) -> list[str]:
    from . import ways

    # The three whose compiled code covers the others': all engines share bodies and kernels.
    return [ways.OURS] if dry else [ways.OURS, ways.INDUCTOR, ways.FULL]


def step(setting: Setting, name: str, label: str) -> None:
    """Three training steps of a workload one way: the third captures."""
    from . import ways, workloads

    workload = workloads.make(name, setting.dry).to(setting.device)
    way = ways.make(setting, label, workload)
    for _ in range(3):
        way.step()
    setting.sync()


def run_share(setting: Setting, labels: set[str], share: str) -> None:
    """Every n-th task, from the i-th on, as `share` says: "i/n". A row tells how long each took."""
    index, count = (int(part) for part in share.split("/"))
    quiet = Quiet("compile", "", setting.store, setting.dry, setting.until, setting.run)
    for task in tasks(labels, setting.dry)[index::count]:
        if setting.left < 3:
            setting.row("not compiled ahead", task=task.name)
            continue
        begun = time.monotonic()
        try:
            task.run(quiet)
            outcome: dict[str, Any] = {}
        except Exception as error:
            outcome = {"failed": f"{type(error).__name__}: {error}"[:300]}
        setting.row("compiled ahead", task=task.name, seconds=round(time.monotonic() - begun, 1), **outcome)
        if not setting.dry:
            quiet.forget()
            torch.cuda.empty_cache()
