"""The iteration's last evaluation is the linearisation: the backward evaluates the body no more."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import as_written, record_solves
from deq_compile.config import Options
from deq_compile.region.body import BodySpec, Linearised
from deq_compile.region.compiled import CompiledLinearised, CompiledRunner, LinearisingEvaluations
from deq_compile.region.modes import Ambient
from deq_compile.region.op import solve_op
from deq_compile.region.site import RegionSpec, register


class Loop(nn.Module):
    """z enters a product, so that what is saved for the backward holds on to z itself."""

    n = 60

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.orthogonal_(self.W.weight, gain=0.6)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.n):
            z = torch.tanh(self.W(z) + 0.1 * z * z + self.U(x))
        return z


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Evaluations of the body, by the method that made them."""
    owners: dict[str, Any] = {"apply": CompiledRunner, "linearise": CompiledRunner, "__call__": LinearisingEvaluations}
    found = dict.fromkeys(owners, 0)
    for name, owner in owners.items():
        original = getattr(owner, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            found[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counted)
    return found


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    y.square().sum().backward(retain_graph=True)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="deq", options={"inner": "aot_eager", "tol": 1e-9, "backward_tol": 1e-9, **options})


def test_the_backward_evaluates_no_more(calls: dict[str, int]) -> None:
    model, x = Loop().double(), torch.randn(4, 12, dtype=torch.float64)
    call = compiled(model)
    for _ in range(3):  # calls 0, 1 and 2 compare with the loop, and the first probes
        gradients(model, call(x))
    for name in calls:
        calls[name] = 0
    mine = gradients(model, call(x))
    assert calls["apply"] == calls["linearise"] == 0
    assert 3 <= calls["__call__"] <= 20
    for a, b in zip(mine, gradients(model, model(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


class UntilClose(Loop):
    """A test of the whole batch ends it; the first samples are done long before."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(100):
            new = torch.tanh(self.W(z) + 0.1 * z * z + self.U(x)) * torch.arange(len(x))[:, None]
            small = (new - z).norm() < 1e-9
            z = new
            if small:
                break
        return z


def test_nor_where_the_loops_own_test_ends_the_solve(calls: dict[str, int]) -> None:
    model, x = UntilClose().double(), 0.1 * torch.randn(3, 12, dtype=torch.float64)
    torch.nn.init.orthogonal_(model.W.weight, gain=0.3)
    call = torch.compile(model, backend="deq", options={"inner": "aot_eager", "backward_tol": 1e-9})
    for _ in range(3):
        gradients(model, call(x))
    for name in calls:
        calls[name] = 0
    mine = gradients(model, call(x))
    assert calls["apply"] == calls["linearise"] == 0
    assert calls["__call__"] >= 3
    for a, b in zip(mine, gradients(model, model(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_forwards_and_backwards_in_any_order() -> None:
    model = Loop().double()
    xs = [torch.randn(4, 12, dtype=torch.float64) for _ in range(2)]
    expected = [gradients(model, model(x)) for x in xs]
    call = compiled(model)
    gradients(model, call(xs[0]))
    ys = [call(x) for x in xs]
    for i in (1, 0, 1):  # retain_graph: the same backward twice
        for a, b in zip(gradients(model, ys[i]), expected[i], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_what_it_saved_goes_with_the_graph() -> None:
    held: list[weakref.ref[CompiledLinearised]] = []
    original = CompiledLinearised.__init__

    def remember(self: CompiledLinearised, *args: Any) -> None:
        held.append(weakref.ref(self))
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledLinearised, "__init__", remember)
        model, x = Loop(), torch.randn(4, 12)
        call = compiled(model, tol=1e-5)
        call(x).sum().backward()
        y = call(x)
        gc.collect()
        assert sum(r() is not None for r in held) == 1
        del y
        gc.collect()
        assert sum(r() is not None for r in held) == 0


KEPT = {"verify_tol": 1e-14, "tol": 1e-3}  # the solve is never as close to the loop


@pytest.fixture
def once(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation != "native":
        pytest.skip("about the bodies")
    monkeypatch.setattr(as_written, "SETTLED", 10**9)  # of a region that goes on keeping its loop


@pytest.mark.usefixtures("once")
def test_a_kept_loop_costs_what_the_users_does(calls: dict[str, int]) -> None:
    """N evaluations and N products: nothing is computed again, but where a copy of the ticket arrives."""
    model, x = Loop().double(), torch.randn(4, 12, dtype=torch.float64)
    call = compiled(model, **KEPT)
    expected = gradients(model, model(x))
    for compares in (True, True, True, False):
        calls |= dict.fromkeys(calls, 0)
        y = call(x)
        for _ in range(2):  # retain_graph
            for a, b in zip(gradients(model, y), expected, strict=True):
                torch.testing.assert_close(a, b)
        assert compares or calls == {"apply": 0, "linearise": 0, "__call__": 60}
    for lean in (compiled(model, loop_memory=8, **KEPT), compiled(model, inner="eager", **KEPT), call):
        lean(x)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            y = lean(x)
        for a, b in zip(gradients(model, y), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_what_a_kept_loop_saved_goes_with_the_graph(inner: str) -> None:
    model, x = Loop(), torch.randn(4, 12)
    call = compiled(model, inner=inner, **KEPT)
    for _ in range(3):
        call(x).sum().backward()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Linearised) for o in gc.get_objects())

    before = alive()
    y = call(x)
    assert alive() == before + 60
    del y
    assert alive() == before


@pytest.mark.parametrize("iterations", [None, 4])
def test_what_a_region_returns_is_not_what_it_saved(iterations: int | None) -> None:
    """A body may save its result; the region's result holds what was saved, may not hold itself, and is the user's to change."""

    def body(z: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(0.4 * z * w + x),)

    w, x = torch.ones(4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    config = Options(tol=1e-9, verify="first").resolve()
    spec = BodySpec(body, "test-returns", Ambient.now(), "aot_eager")
    site = register(RegionSpec(spec, (x.dtype,), ((0, 1),), iterations, True, config, needs=(True, False)))  # held: it is ours
    for _ in range(4):  # calls 0, 1 and 2 compare a loop; from then on it is linearised
        state, ticket, _, held = solve_op([torch.zeros_like(x)], [w, x], [], site.key)
    left: Any = ticket.saved
    linears = left.loop if iterations else [left.linear]
    assert len(linears) == (iterations or 1)
    kept = [t.untyped_storage().data_ptr() for linear in linears for t in linear.saved if isinstance(t, Tensor)]
    assert kept
    assert state.untyped_storage().data_ptr() not in [*kept, held.untyped_storage().data_ptr()]
    assert torch.equal(state.flatten(), held)


def test_a_solve_that_misses_is_linearised_where_it_ends(calls: dict[str, int]) -> None:
    """The best iterate need not be the last one that was evaluated."""
    model, x = Loop().double(), torch.randn(4, 12, dtype=torch.float64)
    model.n = 7
    call = compiled(model, max_iter=4, semantics="equilibrium", backward_max_iter=40)
    with pytest.warns(UserWarning, match="missed tol"):
        gradients(model, call(x))
    assert calls["linearise"] == 1


def test_where_the_time_goes() -> None:
    """Parts exclude each other and add up to what a region took; without the option nothing is kept."""
    model, x = Loop(), torch.randn(4, 12)
    call = compiled(model, tol=1e-5)
    call(x).sum().backward()
    with record_solves(timing=True) as solves:
        begun = time.perf_counter()
        call(x).sum().backward()
        total = time.perf_counter() - begun
    seconds = solves[0].seconds
    assert seconds is not None
    assert set(seconds) == {"body", "vjp", "solver", "overhead"}
    assert all(part > 0 for part in seconds.values())
    assert sum(seconds.values()) < total
    with record_solves() as solves:
        call(x).sum().backward()
    assert solves[0].seconds is None


def test_a_solve_that_plain_iteration_bettered_is_linearised_again(calls: dict[str, int]) -> None:
    """The last evaluation was the other solve's: no sample of the result need lie there."""

    def body(z: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(z @ w + x),)

    w = torch.randn(4, 4, dtype=torch.float64).triu(1).requires_grad_()  # plain iteration ends after five evaluations
    x = torch.randn(3, 4, dtype=torch.float64)
    config = Options(tol=1e-12, max_iter=5, backward_tol=1e-9, verify="never").resolve()
    spec = BodySpec(body, "test-bettered", Ambient.now(), "aot_eager")
    site = register(RegionSpec(spec, (x.dtype,), ((0, 1),), None, True, config, needs=(True, False)))
    found = solve_op([torch.zeros_like(x)], [w, x], [], site.key)[0]
    (mine,) = torch.autograd.grad(found.square().sum(), w)
    assert calls["linearise"] == 1
    z = torch.zeros_like(x)
    for _ in range(12):  # as many again at the fixed point, for the gradient
        (z,) = body(z, w, x)
    (expected,) = torch.autograd.grad(z.square().sum(), w)
    torch.testing.assert_close(found, z)
    torch.testing.assert_close(mine, expected)
