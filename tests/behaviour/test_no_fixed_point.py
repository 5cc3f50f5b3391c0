"""Maps without a fixed point, or none that the user's iterations reach: the user's own iterate and gradient, and a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_compile import RegionWarning, fixed_point
from deq_compile.region.forward import solve
from deq_compile.region.status import Status, converged
from tests.helpers import compiled, largest_error, reference, value_and_grads


class Block(nn.Module):
    """z + g(norm(z + x)), an undamped pre-norm block: |f(z) - z| stays while |z| grows, so a relative residual falls for ever."""

    def __init__(self, test: str = "relative", keep: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.test, self.keep = nn.Linear(16, 32), nn.Linear(32, 16), test, keep

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return self.keep * z + self.b(F.gelu(self.a(F.layer_norm(z + x, (16,)))))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(12):
            old, z = z, self.f(z, x)
            if self.test == "none":
                continue
            gap = (z - old).norm()
            if self.test == "relative":
                gap = gap / z.norm()
            if gap < 1e-4:
                break
        return z


def iterate(f: Callable[[Tensor], Tensor], x0: Tensor, max_iter: int = 12, tol: float = 1e-4) -> Tensor:
    x = x0
    for _ in range(max_iter):
        new = f(x)
        gap, x = (new - x).norm() / new.norm(), new
        if gap < tol:
            break
    return x


class Called(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = iterate(lambda z: self.f(z, x), torch.zeros_like(x))
        return self.f(z, x)


MODELS = {
    "counted": lambda: Block("none"),
    "relative test": lambda: Block("relative"),
    "absolute test": lambda: Block("absolute"),
    "slow": lambda: Block("relative", 0.9),
    "called": Called,
}


@pytest.mark.filterwarnings("ignore::deq_compile.RegionWarning")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_users_own_iterate_and_gradient(make: Callable[[], Block]) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    model = make()
    run, _ = compiled(model, tol=None)
    expected = reference(model, x)
    for _ in range(4):
        assert largest_error(value_and_grads(run, model, x), expected) < 1e-4


@pytest.mark.filterwarnings("ignore::deq_compile.RegionWarning")
@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard"])
def test_no_solver_calls_a_runaway_converged(solver: str) -> None:
    model, x = Block(), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    for stop_mode in ("rel", "abs"):
        found = solve(lambda z: model.f(z, x), torch.zeros(4, 16), solver=solver, stop_mode=stop_mode, max_iter=400, tol=1e-4)
        assert not converged(found.status).any()


def test_fixed_point_warns_and_stays_where_plain_iterations_come() -> None:
    """There is no loop of the user's, so it says so; |z| is what plain iterations reach, not a number of the solver's own."""
    model, x = Block(), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    with pytest.warns(RegionWarning, match="missed tol"):
        z = fixed_point(lambda z: model.f(z, x), torch.zeros_like(x))
    plain = torch.zeros_like(x)
    for _ in range(40):
        plain = model.f(plain, x)
    assert (z.norm(dim=1) <= 2 * plain.norm(dim=1)).all()


def test_a_warm_start_is_exempt() -> None:
    """At the fixed point, at the precision's floor and a little beside, nothing has to fall."""
    W = 0.5 * torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)))[0]
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ W + x)

    there = solve(f, torch.zeros(4, 16), tol=1e-7, max_iter=100).z
    for beside in (0.0, 1e-6, 3e-5, 1e-4, 1e-3):
        start = there * (1 + beside)
        for solver in ("broyden", "anderson", "picard"):
            found = solve(f, start, solver=solver, tol=1e-4, max_iter=40)
            assert found.status.tolist() == [Status.CONVERGED] * 4
            assert found.evaluations <= (1 if beside < 1e-4 else 6 if solver != "picard" else 12)


def test_growth_by_a_hundred_is_no_runaway() -> None:
    """A slow body's fixed point is far larger than its first image."""
    x = torch.ones(2, 4, dtype=torch.float64)
    for solver in ("broyden", "anderson", "picard"):
        found = solve(lambda z: 0.99 * z + x, torch.zeros(2, 4, dtype=torch.float64), solver=solver, tol=1e-4, max_iter=2000)
        assert found.status.tolist() == [Status.CONVERGED] * 2


def test_a_residual_without_digits_is_no_convergence() -> None:
    """At |z| = 1e20, z + 0.3 is z."""
    step = F.normalize(torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)

    def f(z: Tensor) -> Tensor:
        return z + 0.3 * F.normalize(z + step, dim=1)

    for solver in ("broyden", "anderson"):
        assert not converged(solve(f, torch.zeros_like(step), solver=solver, tol=1e-9, max_iter=400).status).any()


@pytest.mark.filterwarnings("ignore::deq_compile.RegionWarning")
def test_a_body_that_oscillates_is_the_loop() -> None:
    def loop(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(41):
            z = torch.cos(3 * z) + x
        return z

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    run, _ = compiled(loop, tol=None)
    with warnings.catch_warnings():
        for _ in range(4):
            torch.testing.assert_close(run(x), loop(x), rtol=1e-3, atol=1e-3)  # chaotic: rounding grows in 41 steps
