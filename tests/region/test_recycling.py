"""Factors that outlive the step: the same answers in fewer evaluations, equal runs with equal bits, off where they do not pay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deq_compile
from deq_compile import fixed_point, record_solves
from deq_compile.kernels.broyden.reference import dense_broyden
from deq_compile.kernels.recycle import Shared, Sketch, compress
from deq_compile.region import pool as pools
from deq_compile.region.adjoint import AdjointProblem, solve_adjoint
from deq_compile.region.backwards.policy import products
from deq_compile.region.forward import solve
from deq_compile.region.records import SolveRecord
from deq_compile.testing import Backend

D = 40


class Body(nn.Module):
    """tanh(W z + x) with a symmetric W, eigenvalues up to 0.97: slow enough for there to be something to learn."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
        eigenvalues = torch.cat([torch.linspace(0.6, 0.97, 10), torch.linspace(-0.4, 0.4, D - 10)]).double()
        self.W = nn.Parameter((Q @ torch.diag(eigenvalues) @ Q.T).to(dtype))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + x)


def batch(i: int, dtype: torch.dtype = torch.float64, rows: int = 6) -> Tensor:
    return 0.3 * torch.randn(rows, D, generator=torch.Generator().manual_seed(i), dtype=dtype)


def learnt(body: Body, batches: int = 3) -> Shared:
    """What some batches say of the inverse Jacobian."""
    found = None
    for i in range(batches):
        sketch = Sketch(4, 4, i)
        solve(lambda z, i=i: body(z, batch(i)), torch.zeros(6, D).double(), tol=1e-8, sketch=sketch)  # type: ignore[misc]
        rows = sketch.rows()
        assert rows is not None
        found = compress(*rows, 10, found) or found
    assert found is not None
    return found


def dense(shared: Shared) -> Tensor:
    return torch.eye(D, dtype=torch.float64) - shared.A.T @ shared.Yt.T


def train(steps: int, seen: Callable[[Tensor], None] | None = None, **options: Any) -> tuple[list[SolveRecord], list[Tensor]]:
    """Steps of gradient descent, records and gradients."""
    deq_compile.reset()
    body, gradients = Body(), []
    with record_solves() as solves:
        for i in range(steps):
            x = batch(i)
            z = fixed_point(lambda z: body(z, x), torch.zeros(6, D).double(), **{"tol": 1e-6, "verify": "first", **options})  # noqa: B023
            if seen is not None:
                seen(z)
            (gradient,) = torch.autograd.grad((z * batch(100)).sum(), body.W)
            with torch.no_grad():
                body.W.sub_(1e-3 * gradient)
            gradients.append(gradient)
    return solves, gradients


def test_the_iterates_are_those_of_broyden_with_that_inverse() -> None:
    """Kelley's product form with P g in place of g is the textbook's Broyden that begins with H_0 = -P."""
    body = Body()
    shared, x = learnt(body), batch(7)
    P = dense(shared)
    passed: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        passed.append(z[0].clone())
        with torch.no_grad():
            return body(z, x)

    solve(f, torch.zeros(6, D).double(), tol=1e-30, max_iter=9, eta=0.0, shared=shared)
    with torch.no_grad():
        right, _ = dense_broyden(lambda z: z + P @ (body(z[None], x[:1])[0] - z), torch.zeros(D), 8)
    for mine, theirs in zip(passed, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_solve_and_its_adjoint_are_shorter_and_as_good() -> None:
    body = Body()
    shared, x, q = learnt(body), batch(9), batch(10)
    with torch.no_grad():
        alone, helped = (solve(lambda z: body(z, x), torch.zeros_like(x), tol=1e-6, shared=s) for s in (None, shared))
    assert helped.evaluations <= 0.8 * alone.evaluations
    assert float(helped.residual.max()) <= 1e-6
    z = helped.z.requires_grad_()
    fz = body(z, x)

    def vjp(w: Tensor) -> Tensor:
        return torch.autograd.grad(fz, z, w, retain_graph=True)[0]

    J = torch.stack([torch.diag(1 - fz[b].detach() ** 2) @ body.W.detach() for b in range(6)])
    right = torch.stack([torch.linalg.solve(torch.eye(D).double() - J[b].T, q[b]) for b in range(6)])
    plain = solve_adjoint(vjp, lambda w: (vjp(w), None), q, None, tol=1e-8, max_iter=60)
    for factors, given in ((None, shared.T), (helped.state, None)):
        found = solve_adjoint(vjp, lambda w: (vjp(w), None), q, factors, tol=1e-8, max_iter=60, shared=given)
        assert found.recycled
        assert found.vjps < plain.vjps
        assert found.residual <= 1e-8
        torch.testing.assert_close(found.w, right, rtol=1e-5, atol=1e-6)
    raw = solve_adjoint(vjp, lambda w: (vjp(w), None), q, helped.state, tol=float("inf"))
    assert float((raw.w - right).norm() / right.norm()) < float((q - right).norm() / right.norm())


def test_stopping_is_judged_by_the_residual_itself() -> None:
    """Also where the inverse is worthless: what has converged has |f - z| below the tolerance, or says that it has not."""
    body, x = Body(), batch(3)
    g = torch.Generator().manual_seed(1)
    wild = Shared(torch.randn(4, D, generator=g).double(), torch.randn(D, 4, generator=g).double(), torch.ones(4))
    with torch.no_grad():
        found = solve(lambda z: body(z, x), torch.zeros_like(x), tol=1e-6, max_iter=60, shared=wild)
        residual = (body(found.z, x) - found.z).norm(dim=1) / body(found.z, x).norm(dim=1)
    torch.testing.assert_close(residual, found.residual, rtol=1e-6, atol=1e-12)
    assert bool(((residual <= 1e-6) == (found.status == 1)).all())


def test_pairs_that_are_not_finite_or_run_away_never_enter() -> None:
    S, Y = torch.randn(2, 5, D).double()
    for bad in (float("nan"), float("inf"), 1e6):
        sketch, clean = Sketch(3, 1, 0), Sketch(3, 1, 0)
        spoilt = Y.clone()
        spoilt[2] = bad
        sketch.add(S, spoilt)
        S_kept, Y_kept = S.clone(), Y.clone()
        S_kept[2] = Y_kept[2] = 0
        clean.add(S_kept, Y_kept)
        for mine, theirs in zip(sketch.rows() or (), clean.rows() or (), strict=True):
            assert torch.equal(mine, theirs)
    assert compress(torch.zeros(3, D), torch.zeros(3, D), 4) is None
    assert compress(torch.full((3, D), torch.nan), torch.ones(3, D), 4) is None
    assert compress(torch.randn(3, D), torch.zeros(3, D), 4) is None, "an eigenvalue of 1"


def test_equal_runs_are_equal_and_gradients_hold_the_certificate() -> None:
    solves, gradients = train(14, recycle="always")
    again, same = train(14, recycle="always")
    plain, right = train(14, recycle="never", backward_tol=1e-10, tol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert [s.evaluations for s in solves] == [s.evaluations for s in again]
    assert all(s.recycled and s.recycled_adjoint for s in solves[1:])
    assert not solves[0].recycled
    assert all(s.residual <= 1e-6 and (s.adjoint_residual_batch or 0) <= 1e-2 for s in solves)
    assert not any(s.recycled or s.recycled_adjoint for s in plain)
    for mine, exact in zip(gradients[:3], right[:3], strict=True):
        assert float((mine - exact).norm() / exact.norm()) < 0.03


def test_counting_decides_and_turns_on_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "DECIDED_AT", (3,))
    solves, _ = train(6, recycle="auto", backward_tol=1e-4)
    assert not any(s.recycled or s.recycled_adjoint for s in solves[:3]), "nothing before it is decided"
    assert solves[4].evaluations < solves[2].evaluations
    assert all(s.recycled for s in solves[3:])
    assert (solves[4].vjps or 0) <= (solves[2].vjps or 0)


def test_counting_turns_off_what_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "DECIDED_AT", (3,))
    monkeypatch.setattr("deq_compile.region.counting.THIN_COST", 1e6)
    solves, _ = train(6, recycle="auto")
    assert not any(s.recycled or s.recycled_adjoint for s in solves)


def test_backwards_use_what_their_forward_saw() -> None:
    """Two forwards before a backward, a graph that is kept, and backwards repeated after other forwards have fed the pool."""
    deq_compile.reset()
    body = Body()

    def forward(i: int) -> Tensor:
        x = batch(i)
        return fixed_point(lambda z: body(z, x), torch.zeros(6, D).double(), tol=1e-8, backward_tol=1e-6, recycle="always")

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad((z * batch(50)).sum(), body.W, retain_graph=True)[0]

    for i in range(3):
        gradient(forward(i))
    first, second = forward(3), forward(4)
    early = gradient(first)
    late = gradient(second)
    for i in range(5, 16):
        gradient(forward(i))
    assert torch.equal(gradient(first), early)
    assert torch.equal(gradient(second), late)
    deq_compile.reset()
    for z, found in ((forward(3), early), (forward(4), late)):
        torch.testing.assert_close(gradient(z), found, rtol=1e-4, atol=1e-5)


def test_evaluation_neither_feeds_nor_uses_it() -> None:
    deq_compile.reset()
    body, x = Body(), batch(0)

    def run() -> Tensor:
        return fixed_point(lambda z: body(z, x), torch.zeros(6, D).double(), recycle="always")

    with torch.no_grad():
        before = run()
    train_like = [run() for _ in range(3)]
    with torch.no_grad(), record_solves() as solves:
        after = run()
    assert train_like[0].requires_grad
    assert torch.equal(before, after)
    assert not solves[0].recycled


def test_a_pool_that_makes_a_solve_miss_is_dropped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is then the plain solve's."""
    kept: dict[str, Any] = {}
    original = pools.Pool.keep_to

    def spoil(pool: pools.Pool, z: Tensor) -> None:
        kept["pool"] = pool
        if pool.calls == 3:
            assert pool.forward is not None
            pool.forward = Shared(torch.full_like(pool.forward.A, torch.nan), pool.forward.Yt, pool.forward.sigma)
        original(pool, z)

    monkeypatch.setattr(pools.Pool, "keep_to", spoil)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solves, _ = train(5, recycle="always")
    pool = kept["pool"]
    assert pool.dropped == 1
    assert "dropped 1 times" in str(pool)
    assert not solves[3].recycled
    assert solves[3].residual <= 1e-6


def test_other_shapes_empty_it_and_it_is_bounded() -> None:
    shared = learnt(Body())

    def kept(z: Tensor) -> bool:
        pool = pools.Pool(always=True)
        pool.forward = shared
        pool.keep_to(z)
        return pool.forward is shared

    assert shared.rank <= pools.rank_for(D)
    assert kept(torch.zeros(2, D).double())
    assert not kept(torch.zeros(2, D))
    assert not kept(torch.zeros(2, D + 1).double())


def test_a_compiled_loop_recycles_and_explain_says_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body(torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(200):
                z = self.body(z, x)
            return z

    report = deq_compile.Report()
    model = Model()
    compiled = torch.compile(model, backend=Backend({"inner": "eager", "recycle": "always"}, report))
    with record_solves() as solves:
        for i in range(4):
            x = batch(i, torch.float32)
            mine, right = (torch.autograd.grad(call(x).sum(), model.body.W)[0] for call in (compiled, model))
            assert float((mine - right).norm() / right.norm()) < 0.05
    assert solves[3].recycled
    assert solves[3].recycled_adjoint
    assert "factors of earlier batches serve the forward and the adjoint" in str(report)


def test_a_miss_drops_what_missed_and_nothing_else() -> None:
    pool = pools.Pool(always=False)
    shared = learnt(Body())
    pool.forward = pool.adjoint = shared
    pool.pays, pool.way, pool.calls = True, "shared", 60
    pool.drop("forward")
    assert (vars(pool)["forward"], vars(pool)["adjoint"]) == (None, shared)
    assert (pool.pays, pool.way) == (False, "shared")
    assert [call for call in range(61, 400) if _decides(pool, call)] == [80, 100, 200]
    pool.drop("adjoint")
    assert (vars(pool)["adjoint"], pool.way) == (None, "plain")
    assert pool.idle()


def _decides(pool: pools.Pool, call: int) -> bool:
    pool.calls = call
    return pool.due()


def test_decisions_beside_the_usual_ones_have_a_budget() -> None:
    """One part in a hundred of all evaluations."""
    pool = pools.Pool(always=False)
    for call in range(1, 60):
        pool.calls = call
        pool.note(20)
    pool.calls = pool.again = 60
    assert pool.due()
    pool.note(20, deciding=20)
    assert not pool.due()
    pool.note(1000)
    assert pool.due()


def test_a_way_that_falls_behind_is_given_up_half_way() -> None:
    body, x, q = Body(), batch(9), batch(10)
    with torch.no_grad():
        z = solve(lambda z: body(z, x), torch.zeros_like(x), tol=1e-8, max_iter=200).z
    J = (1 - body(z, x).detach() ** 2)[:, :, None] * body.W.detach()
    calls = [0]

    def vjp(w: Tensor) -> Tensor:
        calls[0] += 1
        return torch.einsum("bij,bi->bj", J, w)

    needed = products(vjp, q, None, AdjointProblem(1e-6, max_iter=60))
    assert needed == calls[0]
    calls[0] = 0
    assert products(vjp, q, None, AdjointProblem(1e-6, max_iter=needed), contest=True) == needed
    calls[0] = 0
    most = max(2, needed // 4)
    assert products(vjp, q, None, AdjointProblem(1e-6, max_iter=most), contest=True) is None
    assert calls[0] == -(-most // 2)


def test_one_batch_that_misses_does_not_decide_for_those_to_come() -> None:
    """A missed solve costs several times as much as others; what it says of the ratio is bounded."""
    pool = pools.Pool(always=False)
    pool.decide_forward(without=100, with_it=20, saving=0.97)
    assert pool.pays
    pool.decide_forward(without=100, with_it=115, saving=0.97)
    pool.decide_forward(without=100, with_it=115, saving=0.97)
    assert not pool.pays


def test_misses_of_a_declared_fixed_point_are_looked_into_now_and_then() -> None:
    """Where solves miss with the pool and without, the plain solve is made beside the other at misses 1, 2, 4, 8, ... only."""
    pool = pools.Pool(always=True)
    assert [n for n in range(1, 20) if pool.doubtful()] == [1, 2, 4, 8, 16]
    pool.drop("forward")
    assert pool.doubtful()


def test_no_refinement_asked_for_is_no_miss() -> None:
    solves, _ = train(4, recycle="always", backward_max_iter=0)
    assert all(s.recycled for s in solves[1:])
    assert all(s.vjps == 1 for s in solves)


def test_what_has_become_worse_is_decided_again() -> None:
    """But not at once again: each time it may be twice as long."""
    pool, watch = pools.Pool(always=False), pools.Watch()
    watch.decided(without=10, with_it=7)
    assert not any(watch.doubts(8) for _ in range(20))
    assert any(watch.doubts(14) for _ in range(6))
    asked = []
    for call in range(101, 400):
        pool.calls = call
        pool.reconsider()
        if pool.due() and call % 200:
            asked.append(call)
    assert asked == [101, 121, 161, 241]


def test_an_autocast_of_the_users_is_no_matter_of_the_pool() -> None:
    deq_compile.reset()
    body = Body(torch.float32)
    with record_solves() as solves:
        for i in range(3):
            x = batch(i, torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = fixed_point(lambda z: body(z, x).float(), torch.zeros(6, D), recycle="always", tol=2e-2)  # noqa: B023
            z.sum().backward()
    assert solves[2].recycled
    assert solves[2].recycled_adjoint
    assert solves[2].residual <= 2e-2
