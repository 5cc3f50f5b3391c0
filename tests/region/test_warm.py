"""``warm_start="previous"``: fewer evaluations where calls resemble each other, the same answers everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deq_compile
from deq_compile import fixed_point, record_solves
from deq_compile.region import eager
from deq_compile.region.records import SolveRecord

B, D = 5, 24


class Body(nn.Module):
    """tanh(W z + x), eigenvalues of W up to 0.9."""

    def __init__(self) -> None:
        super().__init__()
        Q = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
        self.W = nn.Parameter(Q @ torch.diag(torch.linspace(-0.5, 0.9, D).double()) @ Q.T)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + x)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, D)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame(i: int) -> Tensor:
    """A film of which each picture resembles the one before."""
    return 0.5 * drawn(0) + 0.002 * i * drawn(1)


def reference(body: Body, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.zeros_like(x)
    for _ in range(400):
        z = body(z, x)
    return z.detach(), torch.autograd.grad((z * q).sum(), body.W)[0]


def run(xs: list[Tensor], **options: Any) -> list[SolveRecord]:
    """Calls and backwards, each held to the loop of 400."""
    body = Body()
    with record_solves() as solves:
        for x in xs:
            q = 1 + 0.1 * x
            z = fixed_point(lambda z, x=x: body(z, x), torch.zeros_like(x), **{"tol": 1e-8, "backward_tol": 1e-6, **options})  # type: ignore[misc]
            (gradient,) = torch.autograd.grad((z * q).sum(), body.W)
            right, theirs = reference(body, x, q)
            torch.testing.assert_close(z.detach(), right, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-5)
    return list(solves)


@pytest.fixture(autouse=True)
def fresh(implementation: str) -> None:
    if implementation != "native":
        pytest.skip("no matter of the implementation")
    deq_compile.reset()


def total(solves: list[SolveRecord]) -> tuple[int, int]:
    later = solves[3:]
    return sum(s.evaluations for s in later), sum(s.vjps or 0 for s in later)


def test_a_film_takes_fewer_evaluations_and_products() -> None:
    film = [frame(i) for i in range(14)]
    warm = total(run(film, warm_start="previous", verify="first"))
    deq_compile.reset()
    cold = total(run(film, verify="first"))
    assert warm[0] < 0.8 * cold[0]
    assert warm[1] < 0.9 * cold[1]


def test_what_does_not_resemble_itself_costs_little_more() -> None:
    others = [0.5 * drawn(i) for i in range(14)]
    warm = total(run(others, warm_start="previous", verify="first", reuse="never"))
    deq_compile.reset()
    cold = total(run(others, verify="first", reuse="never"))
    assert warm[0] <= 1.2 * cold[0]
    assert warm[1] <= 1.2 * cold[1]


def test_each_sample_has_the_start_that_is_nearer() -> None:
    """One of five samples is another picture in every call."""
    film = [frame(i) for i in range(10)]
    for i, x in enumerate(film):
        x[2] = 2.0 * drawn(30 + i, D)
    run(film, warm_start="previous")


def test_other_shapes_begin_from_their_own_start() -> None:
    run([drawn(0), drawn(1, 3, D), drawn(2), drawn(3, 3, D)], warm_start="previous")


def test_it_is_off_unless_it_is_asked_for() -> None:
    solves = run([frame(0)] * 4, verify="never", solver="broyden")
    assert len({s.evaluations for s in solves}) == 1


def test_evaluation_begins_from_the_last_call_too() -> None:
    body, x = Body(), frame(0)
    with torch.no_grad(), record_solves() as solves:
        for _ in range(4):
            z = fixed_point(lambda z: body(z, x), torch.zeros_like(x), tol=1e-8, warm_start="previous", verify="first")
    torch.testing.assert_close(z, reference(body, x, x)[0], rtol=1e-6, atol=1e-6)
    assert solves[-1].evaluations <= 3 < solves[0].evaluations


def test_backwards_begin_from_what_their_forward_saw() -> None:
    """Equal bits when they are repeated, also after other calls."""
    body = Body()

    def forward(i: int) -> Tensor:
        return fixed_point(lambda z: body(z, frame(i)), torch.zeros(B, D).double(), tol=1e-8, warm_start="previous")

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(z.sum(), body.W, retain_graph=True)[0]

    for i in range(4):
        gradient(forward(i))
    for i in range(4, 12, 2):
        first, second = forward(i), forward(i + 1)
        early, late = gradient(first), gradient(second)
        assert torch.equal(gradient(second), late)
        gradient(forward(i))
        assert torch.equal(gradient(first), early)
        assert torch.equal(gradient(second), late)


def test_a_start_from_which_the_solve_misses_is_given_up() -> None:
    body, x = Body(), frame(0)
    with record_solves() as solves:
        for i in range(4):
            if i == 3:  # what is remembered is worthless
                for site in (site for known in eager._sites.values() for site in known.values()):
                    assert site.warm is not None
                    site.warm.z = torch.full_like(x, torch.nan)
                    site.warm.calls, site.warm.better = 1, True
            z = fixed_point(lambda z: body(z, x), torch.zeros_like(x), tol=1e-8, warm_start="previous", verify="first")
    torch.testing.assert_close(z.detach(), reference(body, x, x)[0], rtol=1e-6, atol=1e-6)
    assert solves[-1].converged == 1


class Bistable(nn.Module):
    """z <- tanh(2 z + 0.01 x) from x: two fixed points that attract, and the loop's own start says which."""

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(60):
            z = torch.tanh(2 * z + 0.01 * x)
        return z


@pytest.mark.parametrize("verify", ["periodic", "first", "never"])
def test_where_there_are_several_fixed_points_a_loops_own_start_decides(verify: str) -> None:
    """Also after calls that all went to one of them."""
    run = torch.compile(Bistable(), backend="deq", options={"warm_start": "previous", "inner": "eager", "verify": verify})
    with torch.no_grad():
        for sign in (1, 1, 1, 1, 1, 1, -1, -1, 1, -1, 1):
            x = sign * (0.5 + drawn(40, 4, 3).abs())
            torch.testing.assert_close(run(x), Bistable()(x), rtol=1e-3, atol=1e-3)


def test_a_declared_fixed_point_of_several_is_the_one_that_was_found_last() -> None:
    x = torch.full((2, 3), 0.01, dtype=torch.float64)
    with torch.no_grad():
        for sign in (1, 1, -1):
            z = fixed_point(lambda z: torch.tanh(2 * z + x), sign * torch.ones_like(x), warm_start="previous", solver="picard")
            torch.testing.assert_close(z, torch.tanh(2 * z + x), rtol=1e-3, atol=1e-3)
            assert bool((z > 0).all())


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(100):
            z = self.body(z, x)
        return z


def test_a_compiled_loop_is_right_and_shorter() -> None:
    model = Loop()
    options = {
        "warm_start": "previous",
        "semantics": "equilibrium",
        "inner": "eager",
        "tol": 1e-8,
        "backward_tol": 1e-4,
        "verify": "first",
    }
    call = torch.compile(model, backend="deq", options=options)
    with record_solves() as solves:
        for i in range(6):
            x = frame(i)
            mine, right = (torch.autograd.grad(f(x).square().sum(), model.body.W)[0] for f in (call, model))
            assert float((mine - right).norm() / right.norm()) < 1e-3
    assert solves[-1].evaluations < 0.8 * solves[0].evaluations
