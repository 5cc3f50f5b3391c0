"""What the figures were measured on, and how they spread."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib import metadata
from typing import Any

import psutil
import torch

import deq_compile


def usable_cores() -> int:
    """Cores that this process may run on; a container often has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str:
    """What is installed under that name; of ours what was imported: an editable installation keeps the number it began with."""
    if package == "deq_compile":
        return deq_compile.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, Any]:
    """Machine, versions and threads, as they go into every table and JSON file."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deq_compile": version("deq_compile"),
    }


def one_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['system']}; "
        f"Python {machine['python']}, torch {machine['torch']}, deq_compile {machine['deq_compile']}"
    )


class OtherLoad:
    """Cores that other programs kept busy, on average, since this object was made.

    Two threads that share two cores with anybody wait for each other at every parallel section: a figure taken so can
    be five times too large, and nothing else in a table would show it.
    """

    def __init__(self) -> None:
        self.start = self._sample()

    @staticmethod
    def _sample() -> tuple[float, float]:
        every = psutil.cpu_times()
        busy = sum(every) - every.idle - getattr(every, "iowait", 0.0) - getattr(every, "guest", 0.0)
        return time.perf_counter(), busy - time.process_time()

    def mean_cores(self) -> float:
        now = self._sample()
        return max(0.0, (now[1] - self.start[1]) / (now[0] - self.start[0]))


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (float("nan"), float("nan"))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
