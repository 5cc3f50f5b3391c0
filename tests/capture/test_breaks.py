"""Where a graph ends inside of a loop, `explain` names the line and what stands there."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import Reason, explain

torch.manual_seed(0)
LAYER = torch.nn.Linear(8, 8)
torch.nn.init.orthogonal_(LAYER.weight, gain=0.5)


def f(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(LAYER(z) + x)


def branched(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = f(z, x)
        if z.norm() > 5:  # here
            z = z * 5 / z.norm()
    return z


def equal(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        new = f(z, x)
        if torch.equal(new, z):  # here
            break
        z = new
    return z


def counted_positives(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = f(z, x)
        some = (z > 0).nonzero()  # here
        z = z + 0 * some.shape[0]
    return z


def timed(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = f(z, x) + 0 * float(time.perf_counter_ns())  # here
    return z


def drawn(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for k in range(random.randint(8, 40)):  # here
        z = f(z, x) / (k + 1)
    return z


def drawn_by_torch(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for k in range(int(torch.randint(8, 40, (1,)))):  # here
        z = f(z, x) / (k + 1)
    return z


def drawn_before(x: Tensor) -> Tensor:
    count = torch.randint(8, 40, (1,)).item()  # here
    z = torch.zeros_like(x)
    for k in range(count):
        z = f(z, x) / (k + 1)
    return z


def read_for_another_end(x: Tensor) -> Tensor:
    size = torch.randint(8, 40, (1,)).item()
    z = torch.zeros_like(x)
    for _ in range(30):
        z = f(z, x)
    return z * size


def _in_a_call(z: Tensor, x: Tensor) -> Tensor:
    new = f(z, x)
    if new.norm() > 5:  # here
        new = new * 5 / new.norm()
    return new


def called(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = _in_a_call(z, x)
    return z


def line_of(function: Callable[..., Any]) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if "# here" in line)


CASES: list[tuple[Callable[..., Any], Callable[..., Any], Reason, str]] = [
    (branched, branched, Reason.BRANCH, "torch.where"),
    (called, _in_a_call, Reason.BRANCH, "torch.where"),
    (equal, equal, Reason.BROKEN, "aten.equal"),
    (counted_positives, counted_positives, Reason.BROKEN, "aten.nonzero"),
    (timed, timed, Reason.BROKEN, "perf_counter_ns"),
]


@pytest.mark.parametrize(("model", "holder", "reason", "word"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_the_line_that_ends_the_graph(
    model: Callable[..., Any], holder: Callable[..., Any], reason: Reason, word: str, recwarn: pytest.WarningsRecorder
) -> None:
    torch._dynamo.reset()
    report = explain(model, inner="eager")(torch.randn(4, 8))
    assert not report.regions
    told = next(s for s in report.skipped if s.reason is reason)
    assert (told.location.file, told.location.line) == (__file__, line_of(holder))
    assert word in str(told)


@pytest.mark.parametrize("model", [drawn, drawn_by_torch, drawn_before])
def test_a_count_that_varies_is_told(model: Callable[..., Any]) -> None:
    """A graph holds one count, and is compiled again for the next: what to write instead is said at the first call."""
    torch._dynamo.reset()
    with torch.no_grad():
        report = explain(model, inner="eager")(torch.randn(4, 8))
    (told,) = [s for s in report.skipped if s.reason in {Reason.VARYING, Reason.NOT_TRACED}]
    assert (told.reason, told.location.line) == (Reason.VARYING, line_of(model))
    assert "deq_compile.fixed_point" in str(told)


def test_a_number_that_counts_no_loop_is_no_count() -> None:
    torch._dynamo.reset()
    report = explain(read_for_another_end, inner="eager")(torch.randn(4, 8))
    assert [s.reason for s in report.skipped] == []
    assert len(report.regions) == 1


def test_where_there_is_no_loop_it_says_so() -> None:
    report = explain(lambda x: f(x, x), inner="eager")(torch.randn(4, 8))
    assert "no loop that repeats a map was met" in str(report)
