"""The forward solve: what it returns, when each sample stops, and how often it evaluates the body."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deq_compile.kernels.reuse import apply_transpose
from deq_compile.region.forward import solve
from deq_compile.region.status import AdjointStatus, Status, converged


class Body:
    """tanh(gain z W^T + b), which records its arguments and results."""

    def __init__(self, B: int, D: int, gain: float = 0.9, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(0)
        self.W = (torch.randn(D, D, generator=g, dtype=torch.float64) * gain / D**0.5).to(dtype)
        self.b = torch.randn(B, D, generator=g, dtype=torch.float64).to(dtype)
        self.seen: list[Tensor] = []
        self.grad_enabled = False

    def map(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + self.b)

    def __call__(self, z: Tensor) -> Tensor:
        self.seen.append(z.clone())
        self.grad_enabled |= torch.is_grad_enabled()
        return self.map(z)


def relative_residual(body: Body, z: Tensor) -> Tensor:
    f = body.map(z)
    return (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-9)


@pytest.mark.parametrize("solver", ["broyden", "picard"])
@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "D"), [(1, 1), (5, 127), (5, 128), (5, 129)])
def test_reaches_the_tolerance(B: int, D: int, dtype: torch.dtype, stop_mode: str, solver: str) -> None:
    body = Body(B, D, 0.6, dtype)
    z0 = torch.zeros(B, D, dtype=dtype)
    found = solve(body, z0, solver=solver, tol=1e-4, stop_mode=stop_mode, max_iter=100)
    assert found.status.tolist() == [Status.CONVERGED] * B
    assert converged(found.status).all()
    residual = relative_residual(body, found.z)
    if stop_mode == "abs":
        residual = (body.map(found.z) - found.z).norm(dim=1)
    assert (residual <= 1.01e-4).all()
    # In float32 both are differences of near-equals.
    torch.testing.assert_close(found.residual, residual, rtol=1e-2, atol=0)
    assert found.evaluations == len(body.seen) == found.iterations.max()
    assert (found.state is None) == (solver == "picard")
    assert not z0.any()
    assert not body.grad_enabled


@pytest.mark.parametrize("solver", ["broyden", "picard"])
def test_each_sample_stops_at_its_own_first_evaluation_below_tol(solver: str) -> None:
    body = Body(7, 63, 0.8)
    found = solve(body, torch.zeros(7, 63), solver=solver, tol=1e-4, max_iter=200)
    for i in range(7):
        k = int(found.iterations[i])
        history = torch.stack([relative_residual(body, z)[i] for z in body.seen])
        assert (history[: k - 1] > 1e-4).all()
        assert history[k - 1] <= 1e-4
        for z in body.seen[k - 1 :]:
            assert torch.equal(z[i], found.z[i])
    assert found.iterations.unique().numel() > 1


@pytest.mark.parametrize("solver", ["broyden", "picard"])
def test_the_cap_counts_evaluations_and_the_best_iterate_is_returned(solver: str) -> None:
    # Picard with an expanding body and Broyden early on both have residuals that rise again.
    body = Body(5, 33, 3.0)
    z0 = torch.zeros(5, 33)
    found = solve(body, z0, solver=solver, tol=1e-6, max_iter=9)
    assert found.status.tolist() == [Status.MAX_ITER] * 5
    assert not converged(found.status).any()
    assert found.evaluations == len(body.seen) == 9
    assert found.iterations.tolist() == [9] * 5
    history = torch.stack([relative_residual(body, z) for z in body.seen])
    best = history.argmin(0)
    assert (best < 8).any()
    for i in range(5):
        assert torch.equal(found.z[i], body.seen[int(best[i])][i])
    torch.testing.assert_close(found.residual, history.amin(0))


def test_max_iter_one_returns_a_copy_of_the_start() -> None:
    body = Body(2, 3)
    z0 = torch.randn(2, 3)
    found = solve(body, z0, max_iter=1)
    assert torch.equal(found.z, z0)
    assert found.z.data_ptr() != z0.data_ptr()
    assert len(body.seen) == 1
    assert found.state is not None
    x = torch.randn(2, 3)
    assert torch.equal(apply_transpose(found.state, x), x)


@pytest.mark.parametrize("solver", ["broyden", "picard"])
def test_a_start_at_the_fixed_point_takes_one_evaluation(solver: str) -> None:
    body = Body(3, 17, 0.5, torch.float64)
    exact = solve(body, torch.zeros(3, 17, dtype=torch.float64), tol=1e-13, max_iter=200).z
    body.seen.clear()
    found = solve(body, exact, solver=solver, tol=1e-10)
    assert len(body.seen) == 1
    assert torch.equal(found.z, exact)
    assert found.z.data_ptr() != exact.data_ptr()


@pytest.mark.parametrize("solver", ["broyden", "picard"])
def test_empty_batch_is_not_evaluated(solver: str) -> None:
    body = Body(0, 5)
    found = solve(body, torch.zeros(0, 5), solver=solver)
    assert found.evaluations == 0
    assert not body.seen
    assert found.z.shape == (0, 5)
    assert found.status.shape == found.iterations.shape == found.residual.shape == (0,)
    if found.state is not None:
        assert apply_transpose(found.state, torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("solver", ["broyden", "picard"])
@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
def test_stagnation_at_the_floor_counts_as_converged(stop_mode: str, solver: str) -> None:
    body = Body(5, 64, 0.5)
    found = solve(body, torch.zeros(5, 64), solver=solver, stop_mode=stop_mode, tol=1e-12, max_iter=400)
    assert (found.status == Status.FLOOR).any()
    assert converged(found.status).all()
    assert (relative_residual(body, found.z) < 50 * torch.finfo(torch.float32).eps).all()
    assert found.evaluations < 60


def test_body_eps_moves_the_floor() -> None:
    body = Body(4, 64, 0.5)
    coarse = solve(lambda z: body(z).bfloat16().float(), torch.zeros(4, 64), tol=1e-6, max_iter=400, body_eps=2**-7)
    assert converged(coarse.status).all()
    assert (coarse.status == Status.FLOOR).any()
    assert coarse.evaluations < 60
    unaware = solve(lambda z: body(z).bfloat16().float(), torch.zeros(4, 64), tol=-1.0, max_iter=60, body_eps=0.0)
    assert unaware.status.tolist() == [Status.MAX_ITER] * 4


@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.parametrize("solver", ["broyden", "picard"])
def test_a_failing_sample_returns_its_best_finite_iterate(solver: str, when: int) -> None:
    body = Body(5, 31, 0.7)

    def failing(z: Tensor) -> Tensor:
        f = body(z)
        if len(body.seen) >= when:
            f[2, 0] = math.nan
        return f

    z0 = torch.randn(5, 31)
    found = solve(failing, z0, solver=solver, max_iter=100)
    evaluated = [z[2].clone() for z in body.seen[:when]]
    assert found.status[2] == Status.NONFINITE
    assert found.iterations[2] == when
    if when == 1:  # no iterate is any good: a plain iteration would go on from f(z_0), and so it is returned
        assert math.isnan(found.z[2, 0])
        assert torch.equal(found.z[2, 1:], body.map(z0)[2, 1:])
    else:
        assert torch.equal(found.z[2], evaluated[int(found.residual[2] < math.inf) and when - 2])
    assert (found.residual[2] == math.inf) == (when == 1)
    # The body is not fed what failed, again and again.
    assert all(torch.equal(z[2], z0[2] if when == 1 else found.z[2]) for z in body.seen[when:])
    clean = solve(body.map, z0, solver=solver, max_iter=100)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found.z[others], clean.z[others])
    assert torch.equal(found.iterations[others], clean.iterations[others])
    assert converged(found.status[others]).all()


def test_a_low_precision_body_and_low_precision_factors() -> None:
    body = Body(4, 65, 0.7)
    found = solve(lambda z: body(z).bfloat16(), torch.zeros(4, 65), tol=2e-2, factor_dtype=torch.bfloat16)
    assert found.z.dtype == torch.float32
    assert converged(found.status).all()
    found = solve(body, torch.zeros(4, 65), tol=1e-5, factor_dtype=torch.bfloat16)
    assert found.state is not None
    assert found.state.S.dtype == torch.bfloat16
    assert converged(found.status).all()


@pytest.mark.parametrize("capacity", [1, 3, 12, 40])
def test_room_for_the_factors_changes_no_bit(capacity: int) -> None:
    body = Body(4, 31, 0.7)
    found = solve(body, torch.zeros(4, 31), memory=12, capacity=capacity)
    own = solve(body, torch.zeros(4, 31), memory=12)
    assert found.state is not None
    assert own.state is not None
    assert torch.equal(found.z, own.z)
    assert torch.equal(found.state.n, own.state.n)
    x = torch.randn(4, 31)
    assert torch.equal(apply_transpose(found.state, x), apply_transpose(own.state, x))


def test_strided_start_and_aliasing_body() -> None:
    b = torch.randn(3, 5)
    found = solve(lambda z: b, torch.zeros(5, 3).T, tol=1e-6)
    assert torch.equal(found.z, b)
    assert found.z.is_contiguous()
    assert found.evaluations == 2
    identity = solve(lambda z: z, b)
    assert torch.equal(identity.z, b)
    assert identity.evaluations == 1


def test_wrong_arguments_are_named() -> None:
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"solver among .*got 'newton'"):
        solve(torch.tanh, z, solver="newton")
    with pytest.raises(ValueError, match="stop_mode"):
        solve(torch.tanh, z, stop_mode="relative")
    with pytest.raises(ValueError, match="max_iter >= 1, got 0"):
        solve(torch.tanh, z, max_iter=0)
    with pytest.raises(ValueError, match=r"maps \(2, 3\) to itself, got \(2, 1\)"):
        solve(lambda z: z[:, :1], z)


def test_every_status_has_its_own_message() -> None:
    for kind in (Status, AdjointStatus):
        assert len({s.message for s in kind}) == len(kind)
        assert [kind(int(s)) for s in kind] == list(kind)  # type: ignore[call-arg]
