"""Operators that bodies compute by others on a CPU: how exact they are, and where they stay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from deq_compile.region import rewritten

ULPS = 1.4


def tanh(x: Tensor) -> Tensor:
    found: Tensor = rewritten.tanh(lambda op, *args: op(*args), x)
    return found


def graph_of(x: Tensor) -> Any:
    traced = make_fx(lambda x: (torch.tanh(x) * 2,), tracing_mode="fake")(x)
    rewritten.for_inductor(traced)
    traced.recompile()
    return traced


def count(graph: Any) -> int:
    return sum(node.target is torch.ops.aten.tanh.default for node in graph.graph.nodes)


@pytest.mark.parametrize(
    "values", [torch.linspace(-10, 10, 400_001), torch.logspace(-37, 2, 100_001), torch.linspace(0.6, 0.65, 9999)]
)
def test_tanh_is_within_units_of_the_last_place(values: Tensor) -> None:
    exact = torch.tanh(values.double())
    size = exact.float().abs()
    unit = torch.nextafter(size, torch.tensor(math.inf)) - size
    assert float(((tanh(values).double() - exact).abs() / unit.double()).max()) <= ULPS


def test_tanh_is_odd_and_bounded() -> None:
    x = torch.cat([torch.linspace(0, 20, 10_001), torch.tensor([1e30, math.inf])])
    assert torch.equal(tanh(-x), -tanh(x))
    assert float(tanh(x).max()) == 1.0
    assert math.copysign(1, float(tanh(torch.tensor(-0.0)))) == -1
    assert bool(tanh(torch.tensor(math.nan)).isnan())


def test_float32_on_the_cpu_is_rewritten_and_nothing_else() -> None:
    x = torch.linspace(-3, 3, 101)
    graph = graph_of(x)
    assert count(graph) == 0
    torch.testing.assert_close(graph(x)[0], 2 * torch.tanh(x), rtol=3e-7, atol=0)
    for other in (x.double(), x.bfloat16(), torch.arange(5)):
        kept = graph_of(other)
        assert count(kept) == 1
        assert torch.equal(kept(other)[0], 2 * torch.tanh(other))
    assert count(graph_of(torch.empty(3, device="meta"))) == 1
