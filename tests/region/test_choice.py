"""``solver="auto"``: the solver that is less work, by counting; the same answers; another one where bodies change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deq_compile
from deq_compile import fixed_point, record_solves
from deq_compile.region import choice as choices
from deq_compile.region.solvers import ANDERSON, BROYDEN, PLAIN, Solver
from deq_compile.report import Report
from deq_compile.testing import Backend

B, D = 64, 128  # large enough for a Broyden step to be felt beside its calls


class Body(nn.Module):
    """tanh(W z + x), W orthogonal times `gain` (easy: plain iteration takes as many evaluations), or symmetric with eigenvalues
    near 1 (slow: Anderson's takes fewer than Broyden)."""

    def __init__(self, gain: float, slow: bool = False) -> None:
        super().__init__()
        Q = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
        self.W = nn.Parameter(Q @ torch.diag(torch.linspace(0.3, 0.95, D).double()) @ Q.T if slow else gain * Q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + x)


def batch(i: int) -> Tensor:
    return 0.3 * torch.randn(B, D, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def solve(body: Callable[[Tensor, Tensor], Tensor], x: Tensor, **options: Any) -> Tensor:
    return fixed_point(lambda z: body(z, x), torch.zeros_like(x), **{"solver": "auto", "tol": 1e-7, **options})


def reference(body: nn.Module, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The loop of 600 and its gradient."""
    z = torch.zeros_like(x)
    for _ in range(600):
        z = body(z, x)
    return z.detach(), torch.autograd.grad((z * q).sum(), body.W)[0]


@pytest.fixture(autouse=True)
def fresh(implementation: str) -> None:
    if implementation != "native":
        pytest.skip("no matter of the implementation")
    deq_compile.reset()


@pytest.mark.parametrize("slow", [False, True], ids=["easy", "slow"])
def test_what_is_less_work_is_chosen_and_the_answers_are_right(slow: bool) -> None:
    body = Body(0.3, slow)
    with record_solves() as solves:
        for i in range(4):
            x, q = batch(i), batch(50 + i)
            z = solve(body, x, backward="exact", reuse="never")
            (gradient,) = torch.autograd.grad((z * q).sum(), body.W)
            right, theirs = reference(body, x, q)
            torch.testing.assert_close(z.detach(), right, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-4)
    with record_solves() as alone:
        for i in range(4):
            solve(body, batch(i), solver="anderson" if slow else "picard")
    assert [s.evaluations for s in solves[2:]] == [s.evaluations for s in alone[2:]]


def test_the_report_says_which_and_why() -> None:
    body = Body(0.3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(60):
                z = self.body(z, x)
            return z

    model = Model()
    backend = Backend({"solver": "auto", "inner": "eager", "reuse": "never"}, Report())
    run = torch.compile(model, backend=backend)
    for i in range(3):
        run(batch(i)).sum().backward()
    assert backend.report is not None
    (region,) = backend.report.regions
    assert region.chosen.startswith("plain iteration, less work than Broyden: ")
    assert f"solver      {region.location}: plain iteration" in str(backend.report)


def test_a_body_that_becomes_hard_gets_another_solver_and_is_right_in_that_very_call() -> None:
    body, x = Body(0.3), batch(0)
    for _ in range(4):
        solve(body, x).sum().backward()
    with torch.no_grad():
        body.W.copy_(Body(0.0, slow=True).W)
    q = batch(1)
    with record_solves() as solves:
        for _ in range(6):
            z = solve(body, x, backward="exact")
            (gradient,) = torch.autograd.grad((z * q).sum(), body.W)
            right, theirs = reference(body, x, q)
            torch.testing.assert_close(z.detach(), right, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-4)
    with record_solves() as anderson:
        solve(body, x, solver="anderson")
    assert solves[-1].evaluations == anderson[0].evaluations


def test_a_miss_is_solved_by_broyden_and_stays_so_for_a_while() -> None:
    body, x = Body(0.3), batch(0)
    with record_solves() as solves:
        for _ in range(3):
            solve(body, x)
        with torch.no_grad():
            body.W.copy_(Body(0.0, slow=True).W)
        for _ in range(3):
            solve(body, x, max_iter=40)
    easy, hard = solves[:3], solves[3:]
    assert easy[1].evaluations == easy[2].evaluations < 20
    assert all(s.converged == 1 for s in hard)
    assert hard[1].evaluations == hard[2].evaluations


def test_factors_that_pay_keep_broyden() -> None:
    """Plain iteration leaves none; where the adjoint is always to be preconditioned with them, Broyden makes them."""
    body, x = Body(0.3), batch(0)
    with record_solves() as solves:
        for _ in range(3):
            solve(body, x, reuse="always").sum().backward()
    assert all(s.reused for s in solves)


def test_a_region_that_recycles_nothing_has_the_same_choice() -> None:
    """Calls that feed the pool are Broyden's."""
    body, options = Body(0.0, slow=True), {"reuse": "never", "recycle": "auto"}
    with record_solves() as solves:
        for i in range(5):
            solve(body, batch(i), **options).sum().backward()
    with record_solves() as alone:
        solve(body, batch(4), solver="anderson")
        solve(body, batch(0), solver="broyden")
    assert solves[4].evaluations == alone[0].evaluations
    assert solves[0].evaluations == alone[1].evaluations


def test_deciding_costs_little() -> None:
    """Over 200 calls at most 2 % more evaluations than by the better solver alone, the deciding calls included."""
    body = Body(0.3, slow=True)
    counted = [0, 0]
    for k, solver in enumerate(("broyden", "auto")):

        def f(z: Tensor, x: Tensor, k: int = k) -> Tensor:
            counted[k] += 1
            return body(z, x)

        with torch.no_grad():
            for i in range(200):
                x = batch(i)
                solve(f, x, tol=1e-4, solver=solver, batch="rows")
    assert counted[1] <= 1.02 * counted[0]


def test_equal_runs_are_equal_bit_by_bit_and_so_are_repeated_backwards() -> None:
    runs = []
    for _ in range(2):
        deq_compile.reset()
        body, found = Body(0.3), []
        for i in range(3):
            z = solve(body, batch(i))
            one, two = (torch.autograd.grad(z.sum(), body.W, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(one, two)
            found.append((z.detach(), one))
        runs.append(found)
    for (z, g), (y, h) in zip(*runs, strict=True):
        assert torch.equal(z, y)
        assert torch.equal(g, h)


def test_what_solves_cost() -> None:
    small, large = torch.zeros(1, 8), torch.zeros(64, 4096)

    def cost(solver: Solver, evaluations: int, body: float, z: Tensor) -> float:
        return choices.cost_of(solver, evaluations, body, z, 6)

    for solver in (PLAIN, ANDERSON):  # steps cost nothing beside calls
        assert 0.99 <= cost(solver, 12, 1e6, small) / cost(BROYDEN, 12, 1e6, small) <= 1.01
    assert cost(PLAIN, 16, 1e6, large) < cost(BROYDEN, 12, 1e6, large)  # and most of it beside a body that does little
    assert cost(ANDERSON, 24, 1e6, large) < cost(BROYDEN, 20, 1e6, large)
    assert cost(PLAIN, 13, 1e12, large) > cost(BROYDEN, 12, 1e12, large)  # but next to nothing beside one that does much


def test_anderson_is_not_tried_where_it_cannot_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on easy bodies nor where Broyden takes two windows; what was stopped at the first call is not tried again then."""
    asked = []
    whole = choices._Trial.run

    def run(trial: choices._Trial, solver: Solver) -> None:
        asked.append(solver.name)
        whole(trial, solver)

    monkeypatch.setattr(choices._Trial, "run", run)
    for body, options, names in (
        (Body(0.3), {}, ["picard", "picard"]),
        (Body(0.0, slow=True), {}, ["picard", "anderson", "anderson"]),
        (Body(0.0, slow=True), {"anderson_memory": 20}, ["picard"]),
    ):
        asked.clear()
        deq_compile.reset()
        for i in range(22):
            solve(body, batch(i), **options)  # type: ignore[arg-type]
        assert asked == names


def test_anderson_that_comes_to_another_fixed_point_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    body = Body(0.0, slow=True)
    solve(body, batch(0))
    monkeypatch.setattr(choices, "_apart", lambda a, b, tol: True)
    deq_compile.reset()
    with record_solves() as solves:
        for i in range(2):
            solve(body, batch(i))
    with record_solves() as broyden:
        solve(body, batch(1), solver="broyden")
    assert solves[1].evaluations == broyden[0].evaluations


def test_where_the_two_solvers_come_to_different_fixed_points_calls_agree() -> None:
    """One call is not answered by one of them and the next by the other: by plain iteration, whose fixed point the start says."""
    W = 0.02 * torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gain = torch.full((D,), 3.0, dtype=torch.float64, requires_grad=True)
    z0 = 0.5 * torch.randn(32, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(gain * z + z @ W)

    found = []
    for _ in range(4):
        z = fixed_point(lambda z: f(z), z0, solver="auto")
        z.sum().backward()
        found.append(z.detach())
    right = z0
    with torch.no_grad():
        for _ in range(500):
            right = f(right)
        other = fixed_point(lambda z: f(z), z0, solver="broyden")
    assert float((other - right).abs().max()) > 1, "Broyden comes to another"
    for z in found:
        torch.testing.assert_close(z, right, rtol=5e-3, atol=5e-3)


def test_an_error_that_only_a_trial_meets_is_not_the_users() -> None:
    """Broyden's answer is there already, and what its last evaluation saves as well."""
    body, x, calls = Body(0.3), batch(0), 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (broken, broken + 1):  # and again where it is asked once more
            raise ValueError("left the domain")
        return body(z, x)

    broken = -1
    fixed_point(lambda z: f(z), torch.zeros_like(x), solver="broyden", tol=1e-7, batch="rows")
    broken, calls = calls + 3, 0
    deq_compile.reset()
    z = fixed_point(lambda z: f(z), torch.zeros_like(x), solver="auto", tol=1e-7, batch="rows", backward="exact")
    assert calls > broken
    right, theirs = reference(body, x, torch.ones_like(x))
    torch.testing.assert_close(z.detach(), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), body.W)[0], theirs, rtol=1e-4, atol=1e-4)


def test_one_fixed_point_to_within_an_absolute_tolerance() -> None:
    a, b = torch.full((2, 4), 1e-6), torch.full((2, 4), -1e-6)
    assert choices._apart(a, b, 0.0)
    assert not choices._apart(a, b, 1e-6)


def test_what_is_said_where_nothing_else_was_tried_and_after_a_miss() -> None:
    choice = choices.Choice()
    choice.decide(BROYDEN, {"broyden": "8"}, 8.0, 8)
    assert str(choice) == "Broyden, and no other was tried"
    choice.decide(PLAIN, {"broyden": "20", "picard": "21"}, 22.0, 21)
    assert str(choice) == "plain iteration, less work than Broyden: 20 evaluations by Broyden, 21 by plain iteration"
    choice.decide(BROYDEN, {"broyden": "20", "picard": "more than 22"}, 20.0, 20)
    assert str(choice) == "Broyden, less work than plain iteration: 20 evaluations by Broyden, more than 22 by plain iteration"
    choice.several = True
    choice.miss()
    assert choice.solver is BROYDEN
    assert not choice.several


def test_what_was_never_tried_is_tried_at_the_second_decision() -> None:
    choice = choices.Choice()
    choice.decide(BROYDEN, {"broyden": "40", "picard": "more than 50"}, 40.0, 40)
    choice.calls = choices.DECIDED_AT[1] + 1
    assert choice.tries(ANDERSON)
    assert not choice.tries(PLAIN)
