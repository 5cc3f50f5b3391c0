"""The forward's factors serve the adjoint where they save more than they cost, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_compile.kernels.gcr import cpu
from deq_compile.region.adjoint import AdjointProblem, AdjointSolution, solve_adjoint
from deq_compile.region.backwards.policy import factors_pay
from deq_compile.region.forward import Solution, solve

TOL = 1e-3


def pays(problem: Linear) -> bool:
    asked = AdjointProblem(tol=TOL, max_iter=40, body_eps=1e-16)
    return factors_pay(problem.vjp, problem.q, problem.factors, problem.solved(), asked)


class Linear:
    """z = W z + b, with a product that costs `width` times what its result needs."""

    def __init__(self, eigenvalues: Tensor, width: int = 1) -> None:
        g = torch.Generator().manual_seed(0)
        D = len(eigenvalues)
        Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
        self.W, self.width = Q @ torch.diag(eigenvalues.double()) @ Q.T, width
        self.b, self.q = torch.randn(2, 8, D, generator=g, dtype=torch.float64)
        self.forward: Solution = solve(lambda z: z @ self.W.T + self.b, torch.zeros_like(self.b), tol=1e-10, max_iter=60)
        assert self.forward.state is not None
        self.factors = self.forward.state

    def vjp(self, w: Tensor) -> Tensor:
        return (w.repeat(self.width, 1) @ self.W)[: w.shape[0]]

    def solved(self) -> AdjointSolution:
        return solve_adjoint(self.vjp, lambda w: (self.vjp(w), None), self.q, self.factors, tol=TOL)


def test_pays_where_products_are_saved_and_dear() -> None:
    """Half of the space has eigenvalues of its own, which the forward has learnt by heart."""
    eigenvalues = torch.cat([torch.linspace(0.5, 0.95, 12), torch.zeros(12)])
    dear, cheap = Linear(eigenvalues, width=4000), Linear(eigenvalues)
    assert dear.solved().needed < 12
    assert pays(dear)
    assert not pays(cheap)


def test_does_not_pay_where_nothing_is_saved() -> None:
    problem = Linear(torch.full((24,), 0.01), width=4000)
    assert not pays(problem)


def test_a_basis_that_grows_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Linear(torch.linspace(-0.97, 0.97, 40))

    def without() -> AdjointSolution:
        return solve_adjoint(problem.vjp, lambda w: (problem.vjp(w), None), problem.q, None, tol=1e-10, max_iter=40)

    grown = without()
    monkeypatch.setattr(cpu, "PAIRS", 64)
    assert grown.needed > 8
    assert torch.equal(grown.w, without().w)
