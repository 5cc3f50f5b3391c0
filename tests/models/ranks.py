"""Run on every rank by `ranks_training.py`: what this rank decides about its loops, and how long its steps take.

A step ends with a sum over all ranks, as a training step does, so that a rank that waits lets all of them wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deq_compile import Report, explain
from deq_compile.backend import Backend

OPTIONS = {"inner": "eager", "verify_tol": 1e-3}
WEIGHT = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]


def chaotic(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    """A contraction where |gain| < 1; no solver finds a fixed point of it where gain is large."""
    z = torch.zeros_like(x)
    for _ in range(30):
        z = torch.sin(gain * (z @ w)) + x
    return z


def slow(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    """Far from its fixed point after these iterations where gain is near 1."""
    z = torch.zeros_like(x)
    for _ in range(30):
        z = gain * (z @ w) + x
    return z


def decisions() -> dict[str, Any]:
    """What this rank decided, and how long it took; within a process group, on all ranks together."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    said: dict[str, Any] = {"rank": rank, "longest": 0.0, "warned": 0}
    counter = logging.Handler(logging.WARNING)
    counter.emit = lambda record: said.update(warned=said["warned"] + 1)  # type: ignore[method-assign]
    logging.getLogger("deq_compile").addHandler(counter)

    def timed(run: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        result = run()
        said["longest"] = max(said["longest"], time.monotonic() - begun)
        return result

    def step(model: Any, gain: float, batch: int = 4) -> None:
        w = WEIGHT.clone().requires_grad_()
        model(torch.ones(batch, 8) / (rank + 1), torch.tensor(gain), w).sum().backward()
        assert w.grad is not None
        dist.all_reduce(w.grad)

    def compiled(loop: Any) -> tuple[Any, Report]:
        report = Report()
        return torch.compile(loop, backend=Backend(OPTIONS, report)), report

    def statuses(report: Report) -> list[str]:
        return [region.status for region in report.regions]

    # Ranks that find the same, while one of them compiles and calls more often.
    model, report = compiled(chaotic)
    for _ in range(3):
        timed(lambda: step(model, 0.5))
    timed(lambda: step(model, 0.5, 3 if rank == last else 4))  # a smaller last batch
    said["uneven"] = statuses(report)
    if rank == 0:
        inputs = torch.ones(4, 8), torch.tensor(0.5), WEIGHT.clone().requires_grad_()
        said["explained"] = statuses(timed(lambda: explain(chaotic, **OPTIONS)(*inputs)))
        timed(lambda: model(*inputs))
        timed(lambda: model(*inputs))
    dist.barrier()
    # Later one rank alone misses again and again; the others hear of it.
    for _ in range(4):
        timed(lambda: step(model, 40.0 if rank == last else 0.5))
    said["missed"] = [s for s in statuses(report) if s != "solve"][:1]
    for _ in range(17):
        timed(lambda: step(model, 0.5))
    said["after"] = statuses(report)[-1:]

    # One rank alone finds at the first call that the solve is not the loop.
    model, report = compiled(slow)
    timed(lambda: step(model, 0.99 if rank == last else 0.5))
    said["first"] = statuses(report)
    timed(lambda: step(model, 0.99 if rank == last else 0.5))
    said["second"] = statuses(report)
    dist.barrier()
    logging.getLogger("deq_compile").removeHandler(counter)
    return said
