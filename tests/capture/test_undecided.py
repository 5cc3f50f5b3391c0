"""A loop that no other backend would compile as a whole costs no compilation before it is known what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx

from tests.capture.test_given_back import Outer, Until
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models import sparse

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Sparse .* support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]


class Compiler:
    """Stands for Inductor, whose code is not the point here: counts the graphs it is handed, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        self.count += 1
        return make_boxed_func(gm.forward)


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", found)
    return found


@pytest.fixture(autouse=True)
def _cold() -> Iterator[None]:
    """Graphs are counted, so none may come from a cache on disk."""
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def steps(run: Any, model: nn.Module, x: Tensor, count: int, inductor: Compiler, right: list[Tensor]) -> list[int]:
    """Graphs that Inductor compiled in each of some training steps, all of which give the right result."""
    compiled_in = []
    for _ in range(count):
        before = inductor.count
        assert largest_error(value_and_grads(run, model, x), right) < 2e-3
        compiled_in.append(inductor.count - before)
    return compiled_in


def slow(model: Any) -> tuple[Any, Tensor]:
    """Its iterations are many, its eigenvalues near each other: what Broyden's method is good at."""
    torch.manual_seed(0)
    with torch.no_grad():
        model.W.weight.mul_(0.1).add_(0.85 * torch.eye(96))
    return model, 0.02 * torch.randn(64, 96)


def test_a_loop_that_is_given_back_costs_nothing(inductor: Compiler) -> None:
    """What is compiled after the four calls is what Dynamo makes of the model alone: nothing, or, on torch 2.11, some pieces."""
    torch.manual_seed(0)
    model, x = Until(8), torch.randn(4, 8)
    run, report = compiled(model, fullgraph=False, inner="inductor")
    assert steps(run, model, x, 4, inductor, reference(model, x)) == [0] * 4
    assert [region.status for region in report.regions] == ["kept"]


def test_a_loop_that_pays_is_compiled_when_that_is_known(inductor: Compiler) -> None:
    model, x = slow(Until(96))
    run, report = compiled(model, fullgraph=False, inner="inductor", tol=1e-5)
    compiled_in = steps(run, model, x, 6, inductor, reference(model, x))
    assert compiled_in[:4] == [0] * 4
    assert compiled_in[4] > 0
    assert compiled_in[5] == 0
    assert [region.status for region in report.regions] == ["solve"]
    assert report.graphs == 1  # it was traced once


class Averaging(Until):
    """A number of Python's that changes goes into the graph, of which Dynamo has to make a constant or not."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mean = 1.0

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x * self.mean)
        self.mean = 0.5 * self.mean + 0.25
        return z


def test_with_a_number_that_changes(inductor: Compiler) -> None:
    model, x = slow(Averaging(96))
    run, report = compiled(model, fullgraph=False, inner="inductor", tol=1e-5)
    for _ in range(14):
        mean = model.mean
        right = reference(model, x)
        assert model.mean == mean
        assert largest_error(value_and_grads(run, model, x), right) < 2e-3
        assert model.mean == 0.5 * mean + 0.25
    assert inductor.count > 0
    assert {region.status for region in report.regions} <= {"solve", "pending"}


def test_one_graph_is_compiled_at_once(inductor: Compiler) -> None:
    """Where the user asks for one graph no loop can be given back, so nothing is open."""
    torch.manual_seed(0)
    model, x = Outer(nn.Linear(8, 8), Until(8)), torch.randn(4, 8)
    run, _ = compiled(model, inner="inductor")
    assert steps(run, model, x, 1, inductor, reference(model, x))[0] > 0


class FarOff(sparse.Net):
    """Eight steps of a slow iteration: far from its fixed point, and so kept."""

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.U(x), torch.zeros_like(x)
        for _ in range(8):
            z = z + 0.02 * (torch.tanh(torch.sparse.mm(self.A, self.W(z)) + u) - z)
        return z


def test_a_kept_loop_with_a_sparse_matrix_is_compiled_once(inductor: Compiler) -> None:
    torch.manual_seed(0)
    model, x = FarOff(), torch.randn(sparse.NODES, sparse.WIDTH)
    run, report = compiled(model, inner="inductor")
    right = value_and_grads(model, model, x)
    assert steps(run, model, x, 9, inductor, right) == [0, 0, 0, 2, 0, 0, 0, 0, 0]  # as written, forward and backward
    assert [region.status for region in report.regions] == ["kept"]
