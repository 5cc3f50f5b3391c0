"""Tensors made of constants alone have a value while a graph is traced; all others have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile.capture import known
from tests.helpers import compiled, value_and_grads


def test_a_branch_on_a_constant_mask() -> None:
    """As attention code asks of its mask, in the body of a loop and of a solver's call: one graph."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = torch.nn.Linear(8, 8)
            torch.nn.init.orthogonal_(self.W.weight, gain=0.6)

        def f(self, z: Tensor, x: Tensor) -> Tensor:
            mask = torch.triu(torch.ones(4, 4), 1)
            y = self.W(z)
            if mask is not None and mask.any().item():
                y = y + 0.1 * mask.sum()
            if (mask > 2).any():
                y = y * 1000
            return torch.tanh(y + x)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(60):
                z = self.f(z, x)
            return z

    torch.manual_seed(0)
    model, x = Masked(), torch.randn(4, 8)
    run, report = compiled(model)
    for a, b in zip(value_and_grads(run, model, x), value_and_grads(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert [region.status for region in report.regions] == ["solve"]
    assert report.graphs == 1


STATE = [0.0]


@torch._dynamo.allow_in_graph
def reads_more_than_its_arguments() -> Tensor:
    return torch.full((), STATE[0])


def made(how: str, x: Tensor) -> Any:
    if how == "constants":
        return torch.arange(5).sum() + torch.ones(3).sum()
    if how == "random":
        return torch.rand(3).sum()
    if how == "input":
        return x.sum() * 0 + 1
    if how == "written":
        t = torch.zeros(3)
        t[1] = x.sum()
        return t.sum()
    if how == "written by a method":
        t = torch.zeros(3)
        t.add_(x.sum())
        return t.sum()
    if how == "written through a view":
        t = torch.zeros(3)
        v = t[1]
        v.add_(x.sum())
        return t.sum()
    if how == "written as an output":
        t = torch.zeros(3)
        torch.add(x.sum(), 1, out=t[1])
        return t.sum()
    return reads_more_than_its_arguments()


UNKNOWN = (
    "random", "input", "written", "written by a method", "written through a view", "written as an output", "a function of others",
)  # fmt: skip


@pytest.mark.parametrize(
    ("how", "value"),
    [("constants", 13.0), *((n, None) for n in UNKNOWN)],
)
def test_only_functions_of_constants_have_a_value(how: str, value: float | None) -> None:
    seen: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        class Variable:
            def as_proxy(self) -> Any:
                (output,) = gm.graph.find_nodes(op="output")
                return type("Proxy", (), {"node": output.args[0][0]})

        seen.append(known.value_of(Variable()))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: made(how, x), backend=backend)(torch.ones(2))
    (found,) = seen
    assert (found is None) == (value is None)
    assert value is None or float(found.value) == value
