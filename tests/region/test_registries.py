"""A solver and a backward mode from outside, each in one class: compiled, in eager mode, and in `explain`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import explain, fixed_point, record_solves
from deq_compile.kernels.iteration import NORM_EPS, RUNNING, Progress, new_progress, observe
from deq_compile.region.adjoint import AdjointSolution, certified_at
from deq_compile.region.backward import BACKWARDS, AdjointCall, Backward
from deq_compile.region.body import Linearised
from deq_compile.region.solvers import SOLVERS, Problem, Solver
from deq_compile.region.status import AdjointStatus


class DampedPicard(Solver):
    """z <- (z + f(z)) / 2."""

    name = "damped_picard"

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        progress = new_progress(z0, tol=problem.tol, relative=problem.relative, floor=problem.floor(z0.dtype))
        return progress, z0.clone(memory_format=torch.contiguous_format)

    def step(self, progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:
        norm, size = torch.linalg.vector_norm(f - z, dim=1), torch.linalg.vector_norm(f, dim=1) + NORM_EPS
        observe(progress, z, norm, size, last=last, f=f)
        torch.where((progress.done == RUNNING)[:, None], 0.5 * (z + f), z, out=z)


class Twice(Backward):
    """w = 2 q."""

    name = "twice"

    def solve(self, linear: Linearised, q: Tensor, call: AdjointCall) -> AdjointSolution:
        return certified_at(linear.vjp_full, q, 2 * q, AdjointStatus.CONVERGED)


@pytest.fixture
def solver() -> Iterator[str]:
    SOLVERS.register(DampedPicard())
    yield DampedPicard.name
    SOLVERS.remove(DampedPicard.name)


@pytest.fixture
def backward() -> Iterator[str]:
    BACKWARDS.register(Twice())
    yield Twice.name
    BACKWARDS.remove(Twice.name)


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Linear(8, 8)
        nn.init.orthogonal_(self.W.weight, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = torch.tanh(self.W(z) + x)
        return z


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="deq", fullgraph=True, options={"inner": "aot_eager", "max_iter": 80, **options})


def test_a_solver_from_outside(solver: str) -> None:
    model, x = Model(), torch.randn(3, 8)
    want = model(x)
    report = explain(model, solver=solver, inner="aot_eager", max_iter=80)(x)
    assert [r.solver for r in report.regions] == [solver]
    assert solver in str(report)
    with record_solves() as solves:
        torch.testing.assert_close(compiled(model, solver=solver, tol=1e-6)(x), want, rtol=1e-4, atol=1e-5)
        z = fixed_point(lambda z: torch.tanh(model.W(z) + x), torch.zeros_like(x), solver=solver, tol=1e-6, max_iter=80)
    torch.testing.assert_close(z, want, rtol=1e-4, atol=1e-5)
    assert [s.status for s in solves] == ["solve", "solve"]
    assert all(s.iterations > 18 for s in solves), solves  # plain iterations with half a step


def test_a_backward_from_outside(backward: str) -> None:
    """w = 2 q: the gradients are twice the Jacobian-free ones, to the last bit."""
    model, x = Model(), torch.randn(3, 8)
    report = explain(model, backward=backward, inner="aot_eager")(x)
    assert [r.backward for r in report.regions] == [backward]
    assert backward in str(report)

    def gradient(mode: str, eager: bool) -> Tensor:
        given = x.clone().requires_grad_()
        if eager:
            z = fixed_point(lambda z: torch.tanh(model.W(z) + given), torch.zeros_like(x), backward=mode, tol=1e-6)
        else:
            z = compiled(model, backward=mode, tol=1e-6)(given)
        z.sum().backward()
        assert given.grad is not None
        return given.grad

    for eager in (False, True):
        torch.testing.assert_close(gradient(backward, eager), 2 * gradient("jfb", eager), rtol=1e-6, atol=1e-7)


def test_a_name_that_is_taken_or_unknown(solver: str) -> None:
    with pytest.raises(ValueError, match="expected a new name for a solver, got 'damped_picard'"):
        SOLVERS.register(DampedPicard())
    names = "'broyden', 'anderson', 'picard', 'auto', 'reversible', 'damped_picard'"
    with pytest.raises(ValueError, match=f"expected one of {names}"):
        fixed_point(torch.cos, torch.zeros(1), solver="newton")
    with pytest.raises(ValueError, match=r"expected a solver among .*got 'damped' .did you mean 'damped_picard'"):
        SOLVERS["damped"]
