"""Sparse matrices that exist before a loop are operands of it; what is asked of them besides products leaves them alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import Reason, explain
from tests.helpers import compiled, value_and_grads
from tests.models import sparse

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse .* support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def name_of(kind: Any) -> str:
    return str(kind.__name__)


def in_float64(kind: type[sparse.Net], x: Tensor) -> list[Tensor]:
    """The user's own loop in eager mode. Dense, since torch cannot copy a matrix that is kept by rows."""
    torch.manual_seed(0)
    twin = kind().double()
    for name, value in [*vars(twin).items(), *twin.named_buffers()]:
        if isinstance(value, Tensor):
            setattr(twin, name, value.to_dense().double())
    return value_and_grads(twin, twin, x.double())


@pytest.mark.parametrize("kind", sparse.SOLVED, ids=name_of)
def test_solved_in_one_graph(kind: type[sparse.Net]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(sparse.NODES, sparse.WIDTH)
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    for a, b in zip(found, in_float64(kind, x), strict=True):
        assert float((a - b).norm()) <= 2e-3 * max(float(b.norm()), 1e-6)
    assert [region.status for region in report.regions] == ["solve"], str(report)
    for _ in range(30):
        run(torch.randn(sparse.NODES, sparse.WIDTH).requires_grad_())
    assert report.graphs == 1
    assert not report.skipped


@pytest.mark.parametrize("kind", sparse.LEFT_ALONE, ids=name_of)
def test_left_alone(kind: type[sparse.Net]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(sparse.NODES, sparse.WIDTH)
    run, report = compiled(model, fullgraph=False)
    for a, b in zip(value_and_grads(run, model, x), value_and_grads(model, model, x), strict=True):
        torch.testing.assert_close(a, b)
    assert not report.regions
    torch._dynamo.reset()
    told = [s for s in explain(model, inner="eager")(x).skipped if s.reason is Reason.NOT_PLAIN and "fixed_point" in s.detail]
    assert bool(told) is (kind is not sparse.Once)
    assert all(s.location.file == sparse.__file__ for s in told)


def test_it_stays_a_tensor_outside() -> None:
    torch.manual_seed(0)
    model, x = sparse.Returned(), torch.randn(sparse.NODES, sparse.WIDTH)
    run, report = compiled(model)
    z, matrix, is_tensor, shape = run(x)
    assert matrix is model.A
    assert is_tensor is True
    assert shape == (sparse.NODES, sparse.NODES)
    torch.testing.assert_close(z, copy.deepcopy(model)(x)[0], rtol=1e-4, atol=1e-5)
    assert [region.status for region in report.regions] == ["solve"]


class GivenOne(sparse.Net):
    def forward(self, x: Tensor, A: Tensor) -> Tensor:  # type: ignore[override]
        u, z = self.U(x), torch.zeros_like(x)
        for _ in range(sparse.CAP):
            z = torch.tanh(torch.sparse.mm(A, self.W(z)) + u)
        return z


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_another_matrix_in_each_call(layout: torch.layout) -> None:
    """Of the same size once compiled for it; of another layout or none by a graph of its own."""
    torch.manual_seed(0)
    model, x = GivenOne(), torch.randn(sparse.NODES, sparse.WIDTH)
    run, report = compiled(model, tol=1e-7)
    A = sparse.adjacency()
    for i in range(6):
        given = (A.roll(i, 0) if i else A).to_sparse(layout=layout)
        torch.testing.assert_close(run(x, given), copy.deepcopy(model)(x, given), rtol=1e-4, atol=1e-5)
    assert report.graphs == 1
    fewer = torch.where(A > 0.3, A, 0)
    for given in (fewer.to_sparse(layout=layout), fewer, A.to_sparse(layout=layout)):
        dense = given if given.layout == torch.strided else given.to_dense()
        z = torch.zeros_like(x)
        for _ in range(400):
            z = torch.tanh(dense @ model.W(z) + model.U(x))
        if given.layout != torch.strided:
            torch.testing.assert_close(run(x, given), z, rtol=1e-4, atol=1e-5)
    assert {region.status for region in report.regions} == {"solve"}


def test_gradients_to_the_values() -> None:
    torch.manual_seed(0)
    model, x = GivenOne(), torch.randn(sparse.NODES, sparse.WIDTH)
    run, report = compiled(model, fullgraph=False)
    matrices = [sparse.adjacency().to_sparse().coalesce().requires_grad_() for _ in range(2)]
    for call, given in zip((run, model), matrices, strict=True):
        call(x, given).square().sum().backward()
    mine, right = (m.grad.to_dense() for m in matrices if m.grad is not None)
    assert float((mine - right).norm()) <= 2e-3 * float(right.norm())
    assert [region.status for region in report.regions] == ["solve"], str(report)
