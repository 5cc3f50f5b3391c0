"""The first experiments on a device, in order, each with what was predicted before it beside what is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from deq_compile.testing import captures, set_conditional

from . import interplay, solves
from .common import Setting


@triton.jit
def count_trip(count_ptr: Any, limit_ptr: Any, handle_ptr: Any) -> None:
    count = tl.load(count_ptr) + 1
    tl.store(count_ptr, count)
    set_conditional(handle_ptr, tl.where(count < tl.load(limit_ptr), 1, 0))


@triton.jit
def add_one(count_ptr: Any) -> None:
    tl.store(count_ptr, tl.load(count_ptr) + 1)


class Counter:
    """A WHILE graph that goes round a given number of times, with `extra` more tiny kernels in each trip."""

    def __init__(self, setting: Setting, extra: int) -> None:
        device = captures.device_class(setting.device)
        self.count, self.limit, self.other = (torch.zeros(1, dtype=torch.int32, device=setting.device) for _ in range(3))
        condition = device.new_condition()
        add_one[(1,)](self.other, num_warps=1)
        if not setting.dry:
            count_trip.warmup(self.count, self.limit, condition.handle, grid=(1,), num_warps=1)._init_handles()

        def trip() -> None:
            for _ in range(extra):
                add_one[(1,)](self.other, num_warps=1)
            count_trip[(1,)](self.count, self.limit, condition.handle, num_warps=1)

        after = device.capture(lambda: add_one[(1,)](self.other, num_warps=1), keep=True)
        parts = {"condition": condition, "before": None, "trip": device.capture(trip, keep=True), "after": after}
        self.graph = device.while_graph(parts)

    def start(self, trips: int) -> Callable[[], None]:
        def reset() -> None:
            self.count.zero_()
            self.other.zero_()
            self.limit.fill_(trips)

        return reset


def while_nodes(setting: Setting) -> None:
    for extra in (0, 1):
        with setting.guarded("1 and 2: a WHILE node over a counter", kernels=1 + extra):
            counter = Counter(setting, extra)
            exact = True
            for trips in (1, 2, 10, 37):
                counter.start(trips)()
                counter.graph.replay()
                setting.sync()
                exact &= int(counter.count) == trips and int(counter.other) == trips * extra + 1
            low, high = (2, 6) if setting.dry else (10, 1010)
            few, many = (setting.device_us(counter.graph.replay, counter.start(n)) for n in (low, high))
            per_trip = (many - few) / (high - low)
            setting.row(
                "1 and 2: a WHILE node over a counter", kernels=1 + extra, ok=exact, predicted="exact; 2 to 5 µs a trip with two "
                "kernels, above 8 use chunks", us_per_trip=round(per_trip, 2),
            )  # fmt: skip


def run(setting: Setting) -> None:
    while_nodes(setting)
    solves.run(setting)
    interplay.run(setting)
