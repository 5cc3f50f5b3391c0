"""Timing a kernel beside the machine's own loops, in turns: the machine's speed changes from second to second."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from bench import machine

from .ceilings import Loops, Rates, Speeds, floor, level_of, median, taken_ns
from .subjects import Shape, Subject, subjects

CLEARED = 4 << 20  # bytes read and written between two cold calls
FAR = 1 << 27  # bytes; sets that are larger are taken for these: several times any cache
_BLOCK_NS = 3e6  # of hot calls, in each round
_MOST = 50  # calls of a block
_LONG_NS = 5e7  # calls that are longer: three rounds

Row = dict[str, Any]


class Clearing:
    """What a body does to the caches between two steps."""

    def __init__(self) -> None:
        self.memory = torch.zeros(CLEARED // 4)

    def __call__(self) -> None:
        self.memory.add_(1.0)


def faults() -> int:
    """Page faults of this process so far; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(subject: Subject, loops: Loops, rounds: int) -> Row:
    """Medians of hot and cold calls and their floors; bandwidth, hot and cold calls take turns `rounds` times.

    Hot: called again at once, the state put back by copying (which leaves it in the cache). Cold: 4 MiB read and written before
    each call. The cold floor takes first uses from a set that is larger by these 4 MiB.
    """
    clear, count = Clearing(), subject.count
    where = {"hot": count.working_set, "cold": count.working_set + CLEARED, "again": count.again.set_bytes}
    speeds: dict[int, list[Speeds]] = {loops.stream(min(size, FAR)): [] for size in where.values()}
    gflops, hot, cold, faulted = [], [], [], 0
    subject.reset()
    once = taken_ns(subject.call)
    calls = int(min(max(_BLOCK_NS / max(once, 1), 1), _MOST))
    for _ in range(min(rounds, 3) if once > _LONG_NS else rounds):
        gflops.append(loops.gflops())
        for length, found in speeds.items():
            found.append(loops.speeds(32 * length))
        subject.reset()
        subject.call()
        for _ in range(calls):
            subject.reset()
            before = faults()
            hot.append(taken_ns(subject.call) - loops.clock_ns)
            faulted += faults() - before
        for _ in range(min(calls, 8)):
            subject.reset()
            clear()
            cold.append(taken_ns(subject.call) - loops.clock_ns)

    at = {name: median(speeds[loops.stream(min(size, FAR))]) for name, size in where.items()}
    rates = {name: Rates(at[name], at["again"], statistics.median(gflops)) for name in ("hot", "cold")}
    low, high = machine.quartiles(hot)
    return {
        "hot_us": 1e-3 * statistics.median(hot),
        "hot_quartiles_us": [1e-3 * low, 1e-3 * high],
        "cold_us": 1e-3 * statistics.median(cold),
        "hot_floor_us": 1e6 * floor(count, rates["hot"]),
        "cold_floor_us": 1e6 * floor(count, rates["cold"]),
        "arithmetic_us": 1e-3 * count.flops / rates["hot"].gflops,
        "faults": faulted / len(hot),
        "rates": asdict(rates["hot"]),
    }


def rows(shapes: list[Shape], loops: Loops, caches: dict[str, int], rounds: int, kernels: list[str]) -> Iterator[Row]:
    """A row a kernel and shape. "limit" is what its floor comes from: the call, where a call of the same kernel at B = D = 1
    takes longer than the floor; arithmetic; or the cache that holds the working set."""
    calls: dict[str, float] = {}
    for shape in shapes:
        for subject in subjects(shape):
            if subject.name not in kernels:
                continue
            gc.collect()
            row = measure(subject, loops, rounds)
            level = level_of(subject.count.working_set, caches)
            call = calls.setdefault(subject.name, row["hot_us"])
            limit = "arithmetic" if row["arithmetic_us"] >= row["hot_floor_us"] else level
            yield {
                "kernel": subject.name,
                **asdict(shape),
                "bytes": subject.count.moved,
                "flops": subject.count.flops,
                "set_bytes": subject.count.working_set,
                "level": level,
                "limit": "call" if call > row["hot_floor_us"] else limit,
                **row,
            }
