"""The adjoint solve against a dense one, its certificate, and the number of VJPs it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors, factors_of
from deq_compile.kernels.reuse import Multisecant, apply_multisecant, apply_transpose, multisecant
from deq_compile.region import adjoint
from deq_compile.region.adjoint import AdjointSolution, jacobian_free, solve_adjoint
from deq_compile.region.forward import Solution, solve
from deq_compile.region.status import AdjointStatus


class Problem:
    """tanh(z W^T + b) solved, its Jacobians, and VJPs that count their calls. The payload is the w it belongs to."""

    def __init__(self, B: int = 5, D: int = 33, gain: float = 0.9, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(0)
        W = (torch.randn(D, D, generator=g, dtype=torch.float64) * gain / D**0.5).to(dtype)
        b = torch.randn(B, D, generator=g, dtype=torch.float64).to(dtype)
        self.q = torch.randn(B, D, generator=g, dtype=torch.float64).to(dtype)
        self.forward: Solution = solve(lambda z: torch.tanh(z @ W.T + b), torch.zeros(B, D, dtype=dtype), tol=1e-6, max_iter=60)
        self.J = (1 - self.forward.z**2)[:, :, None] * W
        self.calls: list[str] = []

    def vjp(self, w: Tensor) -> Tensor:
        self.calls.append("vjp")
        return (w[:, None] @ self.J)[:, 0]

    def vjp_full(self, w: Tensor) -> tuple[Tensor, Any]:
        self.calls.append("full")
        return (w[:, None] @ self.J)[:, 0], w.clone()

    def solve(self, **options: Any) -> AdjointSolution:
        self.calls.clear()
        found = solve_adjoint(self.vjp, self.vjp_full, self.q, self.forward.state, **options)
        self.check(found)
        return found

    def check(self, found: AdjointSolution) -> None:
        """What holds however the solve ended."""
        assert torch.equal(found.payload, found.w)
        assert found.vjps == len(self.calls)
        assert found.needed <= found.vjps <= found.needed + 1
        residual = self.q + (found.w[:, None] @ self.J)[:, 0] - found.w
        norms = self.q.norm(dim=1)
        expected = torch.where(norms > 0, residual.norm(dim=1) / norms, 0)
        torch.testing.assert_close(found.residuals, expected, rtol=1e-5, atol=1e-9)
        assert found.residual == pytest.approx(float(residual.norm() / self.q.norm()) if norms.any() else 0, rel=1e-4)

    def exact(self) -> Tensor:
        eye = torch.eye(self.q.shape[1], dtype=self.q.dtype)
        return torch.linalg.solve(eye - self.J.transpose(1, 2), self.q)


@pytest.mark.parametrize(("B", "D"), [(1, 1), (1, 127), (5, 128), (5, 129), (5, 31)])
def test_equals_the_dense_solve(B: int, D: int) -> None:
    p = Problem(B, D)
    q = p.q.clone()
    found = p.solve(tol=1e-11, max_iter=100)
    assert found.status == AdjointStatus.CONVERGED
    assert found.residual <= 1e-11
    torch.testing.assert_close(found.w, p.exact(), rtol=1e-7, atol=1e-9)  # tol times the condition number, about 30
    assert torch.equal(p.q, q)


def test_estimates_are_gmres_and_one_step_of_m() -> None:
    # x minimises the residual over span{M q, M (A M) q, ...}, by least squares on an orthonormal basis; w = x + M (q - A x)
    p = Problem()
    factors = p.forward.state
    assert factors is not None
    eye = torch.eye(33, dtype=torch.float64)
    for i in range(5):
        one = factors_of(*(t[i : i + 1].expand(33, *t.shape[1:]).contiguous() for t in (factors.S, factors.C, factors.n)))
        M = apply_multisecant(multisecant(one), eye).T
        A = eye - p.J[i].T
        basis = (p.q[i] / p.q[i].norm())[:, None]
        for k in (1, 2, 3, 6):
            while basis.shape[1] < k:
                basis = torch.linalg.qr(torch.cat((basis, A @ M @ basis[:, -1:]), 1)).Q
            Z = M @ basis[:, : k - 1]
            x = Z @ torch.linalg.lstsq(A @ Z, p.q[i]).solution if k > 1 else torch.zeros(33, dtype=torch.float64)
            found = p.solve(tol=1e-12, max_iter=k)
            torch.testing.assert_close(found.w[i], x + M @ (p.q[i] - A @ x), rtol=1e-8, atol=1e-9)  # rounding times cond(A M)


def test_without_factors_it_starts_at_the_cotangent() -> None:
    p = Problem()
    found = solve_adjoint(p.vjp, p.vjp_full, p.q, None, tol=1e-10, max_iter=100)
    p.check(found)
    torch.testing.assert_close(found.w, p.exact(), rtol=1e-7, atol=1e-8)  # tol times the condition number
    p.calls.clear()
    found = solve_adjoint(p.vjp, p.vjp_full, p.q, None, tol=math.inf)
    assert torch.equal(found.w, p.q)
    assert found.w.data_ptr() != p.q.data_ptr()


def test_one_raw_reuse_is_one_vjp() -> None:
    p = Problem()
    found = p.solve(tol=math.inf)
    assert p.calls == ["full"]
    assert found.status == AdjointStatus.CONVERGED
    assert p.forward.state is not None
    assert torch.equal(found.w, apply_transpose(p.forward.state, p.q))
    assert found.residual > 1e-3


def test_jacobian_free_is_one_vjp() -> None:
    p = Problem()
    found = jacobian_free(p.vjp_full, p.q)
    p.check(found)
    assert p.calls == ["full"]
    assert torch.equal(found.w, p.q)


def test_reuse_saves_vjps() -> None:
    p = Problem(gain=0.8)
    reused = p.solve(tol=1e-2).needed
    found = solve_adjoint(p.vjp, p.vjp_full, p.q, None, tol=1e-2)
    assert reused < found.needed


def test_a_right_prediction_wastes_nothing() -> None:
    p = Problem()
    first = p.solve(tol=1e-3)
    assert first.needed > 2
    assert p.calls == ["full"] + ["vjp"] * (first.needed - 1) + ["full"]
    right = p.solve(tol=1e-3, expected=first.needed)
    assert p.calls == ["vjp"] * (first.needed - 1) + ["full"]
    assert torch.equal(right.w, first.w)
    early = p.solve(tol=1e-3, expected=2)
    assert p.calls == ["vjp", "full"] + ["vjp"] * (first.needed - 2) + ["full"]
    assert torch.equal(early.w, first.w)
    late = p.solve(tol=1e-3, expected=99)
    assert p.calls == ["vjp"] * first.needed + ["full"]
    assert torch.equal(late.w, first.w)
    assert late.needed == first.needed


def test_a_loose_tolerance_takes_the_first_estimate() -> None:
    p = Problem(gain=0.3)
    found = p.solve(tol=0.9)
    assert p.calls == ["full"]
    assert found.status == AdjointStatus.CONVERGED


def test_the_cap_counts_vjps() -> None:
    p = Problem()
    for cap in (1, 2, 4):
        found = p.solve(tol=1e-10, max_iter=cap, expected=50)
        assert p.calls == ["vjp"] * (cap - 1) + ["full"]
        assert found.status == AdjointStatus.MAX_ITER
        assert found.vjps == cap
    with pytest.raises(ValueError, match="max_iter >= 1"):
        p.solve(tol=1e-3, max_iter=0)


def test_float32_stops_at_its_floor() -> None:
    p = Problem(gain=0.5, dtype=torch.float32)
    p.calls.clear()
    found = solve_adjoint(p.vjp, p.vjp_full, p.q, p.forward.state, tol=1e-12, max_iter=100)
    assert found.status == AdjointStatus.FLOOR
    assert found.residual < 50 * torch.finfo(torch.float32).eps
    assert found.vjps < 40


def test_the_batch_decides_not_the_worst_sample() -> None:
    p = Problem()
    p.q[1] *= 1e-3
    found = p.solve(tol=1e-2)
    assert found.residual <= 1e-2
    p.q[1] *= 1e-9
    assert p.solve(tol=1e-2).residual <= 1e-2


def test_samples_without_cotangent_need_no_work() -> None:
    p = Problem()
    whole = p.solve(tol=1e-8, max_iter=60)
    p.q[[0, 3]] = 0
    found = p.solve(tol=1e-8, max_iter=60)
    assert not found.w[[0, 3]].any()
    assert not found.residuals[[0, 3]].any()
    torch.testing.assert_close(found.w[[1, 2, 4]], whole.w[[1, 2, 4]], rtol=1e-5, atol=1e-6)  # both to tol 1e-8
    p.q.zero_()
    found = p.solve(tol=1e-8)
    assert p.calls == ["full"]
    assert not found.w.any()
    assert found.residual == 0
    assert found.status == AdjointStatus.CONVERGED


def test_empty_batch() -> None:
    found = solve_adjoint(lambda w: w, lambda w: (w, "payload"), torch.zeros(0, 4), None, tol=1e-3)
    assert found.w.shape == (0, 4)
    assert found.payload == "payload"
    assert found.residual == 0


class Spoiled(Problem):
    """A problem whose VJP number ``at`` (and all later ones with ``on``) is spoiled for sample 2."""

    def __init__(self, at: int, factor: float, on: bool = False) -> None:
        super().__init__()
        self.at, self.factor, self.on = at, factor, on
        self.seen: list[Tensor] = []

    def _spoil(self, w: Tensor, jw: Tensor) -> Tensor:
        self.seen.append(w.clone())
        if len(self.seen) == self.at or (self.on and len(self.seen) > self.at):
            jw[2] = jw[2] * self.factor
        return jw

    def vjp(self, w: Tensor) -> Tensor:
        return self._spoil(w, super().vjp(w))

    def vjp_full(self, w: Tensor) -> tuple[Tensor, Any]:
        jw, payload = super().vjp_full(w)
        return self._spoil(w, jw), payload


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vjp_that_fails_falls_back_to_the_best_estimate(bad: float) -> None:
    p = Spoiled(4, bad)
    found = p.solve(tol=1e-10, max_iter=12)
    assert found.status == AdjointStatus.FALLBACK_BEST
    assert any(torch.equal(found.w[2], w[2]) for w in p.seen[:3])
    assert math.isfinite(found.residual)
    clean = Problem().solve(tol=1e-10, max_iter=12)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found.w[others], clean.w[others])


@pytest.mark.parametrize("cap", [1, 6])
def test_a_first_vjp_that_fails_falls_back_to_the_cotangent(cap: int) -> None:
    p = Spoiled(1, math.nan)
    found = p.solve(tol=1e-10, max_iter=cap)
    assert found.status == AdjointStatus.FALLBACK_COTANGENT
    assert torch.equal(found.w[2], p.q[2])
    assert math.isfinite(found.residual)
    assert found.vjps == (2 if cap == 1 else cap)


def test_the_last_vjp_that_fails_costs_one_more() -> None:
    p = Spoiled(3, math.nan)
    found = p.solve(tol=1e-10, max_iter=3)
    assert found.status == AdjointStatus.FALLBACK_BEST
    assert p.calls[-2:] == ["full", "full"]
    assert found.vjps == 4


def test_a_residual_that_blows_up_falls_back() -> None:
    p = Spoiled(6, 1e4)
    found = p.solve(tol=1e-10, max_iter=6)
    assert found.status == AdjointStatus.FALLBACK_BEST
    assert any(torch.equal(found.w[2], w[2]) for w in p.seen[:5])
    assert found.residual < 10


def test_a_wild_operator_falls_back_to_the_cotangent(monkeypatch: pytest.MonkeyPatch) -> None:
    def wild(factors: Factors, skip: int) -> Multisecant:
        operator = multisecant(factors, skip)
        operator.V[2] *= -1e4
        return operator

    p = Problem()
    monkeypatch.setattr(adjoint, "multisecant", wild)
    found = p.solve(tol=1e-10, max_iter=1)
    assert found.status == AdjointStatus.FALLBACK_COTANGENT
    assert torch.equal(found.w[2], p.q[2])


def test_hopeless_vjps_are_reported() -> None:
    p = Spoiled(1, math.nan, on=True)
    p.calls.clear()
    found = solve_adjoint(p.vjp, p.vjp_full, p.q, p.forward.state, tol=1e-10, max_iter=5)
    assert found.status == AdjointStatus.NONFINITE
    assert torch.equal(found.w[2], p.q[2])
    assert math.isnan(found.residual)
    assert torch.isfinite(found.residuals[[0, 1, 3, 4]]).all()
    assert found.vjps <= 6
