"""A small adjoint residual is no small gradient error: the error is estimated, measured, and a default tolerance judged by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deq_compile
from deq_compile import fixed_point, record_solves
from deq_compile.region.adjoint import solve_adjoint
from deq_compile.region.verdict import GRADIENT_ERROR
from tests.helpers import compiled


def diffusion(n: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    A = torch.zeros(n, n)
    i = torch.randint(0, n, (2, 5 * n), generator=generator)
    A[i[0], i[1]] = 1
    A = ((A + A.T + torch.eye(n)) > 0).float()
    d = A.sum(1).rsqrt()
    return d[:, None] * A * d


class PageRank(nn.Module):
    """Personalised PageRank with teleport 0.1 (Gasteiger et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l1, self.l2 = nn.Linear(32, 64), nn.Linear(64, 7)

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        z = h = self.l2(torch.relu(self.l1(x)))
        for _ in range(60):
            z = 0.9 * (A @ z) + 0.1 * h
        return torch.log_softmax(z, -1)


def gradient(call: Any, model: nn.Module, x: Tensor, A: Tensor, y: Tensor) -> Tensor:
    grads = torch.autograd.grad(nn.functional.nll_loss(call(x, A), y), list(model.parameters()))
    return torch.cat([g.flatten().double() for g in grads])


def test_a_default_tolerance_is_judged_by_the_gradient() -> None:
    model, A = PageRank(), diffusion()
    x, y = torch.randn(200, 32), torch.randint(0, 7, (200,))
    right = gradient(model.double(), model, x.double(), A.double(), y)
    model.float()
    run, report = compiled(model, tol=None, backward_tol=None)
    with record_solves() as solves:
        errors = [float((gradient(run, model, x, A, y) - right).norm() / right.norm()) for _ in range(4)]
    assert report.regions[0].status == "solve"
    assert max(errors) < 2 * GRADIENT_ERROR
    for solve in solves:
        assert solve.gradient_error is not None
        assert solve.gradient_error <= GRADIENT_ERROR
    assert report.regions[0].gradient_error == solves[-1].gradient_error
    assert "gradient    " in str(report)


@pytest.mark.parametrize("transformed", [False, True])
def test_a_declared_fixed_point_is_judged_too(transformed: bool) -> None:
    """Also inside of torch.func."""
    A, h0, q = diffusion(), *torch.randn(2, 200, 7, generator=torch.Generator().manual_seed(1))
    W = torch.randn(7, 7, generator=torch.Generator().manual_seed(2)) / 3

    def loss(W: Tensor, solve: Any) -> Tensor:
        A_, h, q_ = A.to(W), h0.to(W) @ W, q.to(W)
        z: Tensor = solve(lambda z: 0.95 * (A_ @ z) + 0.05 * h, torch.zeros_like(h))
        return (z * q_).sum()

    def loop(f: Any, z: Tensor) -> Tensor:
        for _ in range(500):
            z = f(z)
        return z

    def by_autograd(W: Tensor, solve: Any) -> Tensor:
        W = W.clone().requires_grad_()
        return torch.autograd.grad(loss(W, solve), W)[0]

    deq_compile.reset()
    right = by_autograd(W.double(), loop)
    for _ in range(2):
        found = torch.func.grad(loss)(W, fixed_point) if transformed else by_autograd(W, fixed_point)
        assert float((found - right).norm() / right.norm()) < GRADIENT_ERROR


def test_an_explicit_tolerance_stays_and_its_error_is_told() -> None:
    model, A = PageRank(), diffusion()
    x, y = torch.randn(200, 32), torch.randint(0, 7, (200,))
    run, report = compiled(model, tol=1e-6, backward_tol=1e-2)
    with record_solves() as solves:
        for _ in range(4):
            gradient(run, model, x, A, y)
    assert report.regions[0].gradient_error is not None
    assert report.regions[0].gradient_error > 5e-3
    assert solves[-1].adjoint_residual_batch is not None
    assert 1e-3 < solves[-1].adjoint_residual_batch <= 1e-2


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_the_estimate_is_within_a_factor_of_three(rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    J = Q @ torch.diag(torch.linspace(-0.3, rate, 64, dtype=torch.float64)) @ Q.T
    q = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(64, dtype=torch.float64) - J, q.T).T
    found = solve_adjoint(lambda w: w @ J, lambda w: (w @ J, None), q, None, tol=1e-3, max_iter=60, estimate=True)
    true = float((found.w - exact).norm() / exact.norm())
    assert found.error is not None
    assert true / 3 < found.error < 3 * true + 1e-12 if rate > 0.5 else found.error < 10 * true


def test_the_record_holds_the_estimate() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.W = nn.Linear(8, 8)
            nn.init.orthogonal_(self.W.weight, gain=0.8)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(60):
                z = torch.tanh(self.W(z) + x)
            return z

    model = Model()
    run, _ = compiled(model)
    with record_solves(tensors=True) as solves:
        run(torch.randn(4, 8)).sum().backward()
        fixed_point(lambda z: torch.tanh(model.W(z) + 1), torch.zeros(4, 8), backward_tol=1e-5).sum().backward()
    for solve in solves:
        assert solve.adjoint_error is not None
        assert 0 <= solve.adjoint_error < 1e-3
