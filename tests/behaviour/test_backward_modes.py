"""Every backward mode and solver through the compiler: what it claims, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import record_solves
from tests.helpers import compiled, largest_error, reference, value_and_grads


class Model(nn.Module):
    """tanh(W z + U x) N times; W has norm about 0.6, so that the loop of 60 is at its fixed point."""

    def __init__(self, n: int = 60, width: int = 12) -> None:
        super().__init__()
        self.n, self.W, self.U = n, nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.W.weight.mul_(0.6 / torch.linalg.matrix_norm(self.W.weight, 2))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.n):
            z = torch.tanh(self.W(z) + self.U(x))
        return z


def run(**options: Any) -> tuple[float, Any]:
    model, x = Model(), torch.randn(5, 12)
    expected = reference(model, x)
    fast, _ = compiled(model, **options)
    value_and_grads(fast, model, x)  # the first call verifies
    with record_solves() as solves:
        found = value_and_grads(fast, model, x)
    assert largest_error(found[:1], expected[:1]) < 1e-4
    return largest_error(found, expected), solves[0]


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard"])
def test_exact_with_every_solver(solver: str) -> None:
    error, record = run(solver=solver, backward="exact", backward_tol=None)
    assert error < 2e-5
    assert record.adjoint_residual_batch <= 1e-6
    assert record.status == "solve"


def test_unroll_is_the_loops_own_gradient() -> None:
    error, record = run(backward="unroll", backward_tol=None)
    assert error < 1e-5
    assert record.vjps == 60
    assert record.status == "solve"


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("mode", ["neumann", "phantom"])
def test_truncated_series(mode: str, steps: int) -> None:
    """Against autograd through `steps` (damped) applications from the fixed point."""
    damping = 0.7 if mode == "phantom" else 1.0
    options = {"backward_damping": 0.7} if mode == "phantom" else {}
    model, x = Model(), torch.randn(5, 12)
    double, x64 = Model().double(), x.double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        z = double(x64)
    for _ in range(steps):
        z = damping * torch.tanh(double.W(z) + double.U(x64)) + (1 - damping) * z
    c = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (z * c).sum().backward()
    fast, _ = compiled(model, backward=mode, backward_steps=steps, backward_tol=None, **options)
    with record_solves() as solves:
        found = value_and_grads(fast, model, x)
    expected = [p.grad for p in double.parameters()]
    assert largest_error(found[2:], expected) < 1e-4  # type: ignore[arg-type]
    assert solves[0].vjps == steps
    assert solves[0].adjoint_residual > 1e-3  # it says that this is not the exact gradient


def test_jacobian_free_is_the_first_term() -> None:
    model, x = Model(), torch.randn(5, 12)
    one, _ = compiled(model, backward="neumann", backward_steps=1, backward_tol=None)
    free, _ = compiled(model, backward="jfb", backward_tol=None)
    assert largest_error(value_and_grads(free, model, x), value_and_grads(one, model, x)) < 1e-6


def test_reuse_costs_less_than_no_reuse() -> None:
    reused, alone = run(backward_tol=1e-3, reuse="always")[1], run(backward_tol=1e-3, solver="picard")[1]
    assert reused.vjps <= alone.vjps
    assert reused.adjoint_residual_batch <= 1e-3


def test_double_backward_is_refused() -> None:
    """torch.compile itself refuses it; our operator would too."""
    model, x = Model(), torch.randn(5, 12, requires_grad=True)
    fast, _ = compiled(model)
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), x)
