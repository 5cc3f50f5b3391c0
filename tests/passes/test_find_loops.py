"""What `FindLoops` and `Judge` make of a small graph. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile.passes.base import PassContext
from deq_compile.passes.find_loops import FindLoops
from deq_compile.report import Reason
from tests.passes.graphs import captured, one_loop, run_passes, text


def test_period_of_two_like_halves() -> None:
    """Two sublayers of one shape but other weights: the body is both of them."""
    a, b = torch.randn(4, 4), torch.randn(4, 4)

    def model(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(x @ a)
            x = torch.tanh(x @ b)
        return x

    _, loop = one_loop(model, torch.randn(2, 4), until="find_loops")
    assert (loop.count, loop.period) == (4, 4)


def test_rotation_carries_the_least() -> None:
    """The loop is cut where one tensor crosses, not three."""

    def model(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            a, b = torch.sin(z), torch.cos(z)
            z = a * b + x
        return z

    _, loop = one_loop(model, torch.randn(2, 4), until="find_loops")
    assert len(loop.carried) == 1
    assert (loop.count, loop.period) == (4, 4)


def test_last_segment_is_peeled_where_its_inside_is_read() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.zeros_like(x)
        for _ in range(5):
            new = torch.tanh(z * 0.5 + x)
            residual = (new - z).norm()
            z = new
        return z, residual

    graph, loop = one_loop(model, torch.randn(2, 4))
    assert loop.count == 4
    assert "norm" in text(graph)


def test_refusals_name_operation_and_line() -> None:
    def model(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(x) + 0.1 * torch.rand_like(x)
        return x

    _, context = run_passes(captured(model, torch.randn(2, 4)))
    (skipped,) = context.report.skipped
    assert skipped.reason is Reason.RANDOM
    assert skipped.detail == "rand_like"
    assert skipped.location.line == model.__code__.co_firstlineno + 2
    assert context.loops == []


def integer_state(x: Tensor) -> Tensor:
    for _ in range(4):
        x = torch.bitwise_not(x) * 2
    return x


def sizes_that_grow(x: Tensor) -> Tensor:
    for _ in range(6):
        x = torch.cat([x, x])
    return x


@pytest.mark.parametrize(
    ("function", "reason", "dtype"),
    [(integer_state, Reason.NOT_FLOATING, torch.int64), (sizes_that_grow, Reason.DRIFT, torch.float32)],
)
def test_states_that_are_none(function: Callable[..., Any], reason: Reason, dtype: torch.dtype) -> None:
    _, context = run_passes(captured(function, torch.ones(3, dtype=dtype)))
    assert context.loops == []
    assert [s.reason for s in context.report.skipped] == [reason]


def test_find_is_fast() -> None:
    """2,400 nodes in well under a second (29 ms where it was measured)."""
    weights = [torch.randn(4, 4) for _ in range(12)]

    def model(x: Tensor) -> Tensor:
        for _ in range(100):
            for w in weights:
                x = torch.tanh(x @ w)
        return x

    gm = captured(model, torch.randn(2, 4))
    context = PassContext(lambda nodes: 3)
    FindLoops()(gm.graph, context)
    (loop,) = context.loops
    assert (loop.count, loop.period) == (100, 24)
    assert context.report.seconds["find_loops"] < 2.0
