"""Backwards of one forward: equal cotangents have equal gradients to the last bit, whatever the region has learnt in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deq_compile
from deq_compile import fixed_point
from deq_compile.region import attach, eager, verdict
from deq_compile.region.site import Site, living
from tests.helpers import compiled

B, D = 4, 12
SOLVERS = ["broyden", "picard", "auto"]
MORE: list[dict[str, Any]] = [{}, {"recycle": "always"}, {"warm_start": "previous", "semantics": "equilibrium"}]


class Model(nn.Module):
    """tanh(W z + x), eigenvalues of W up to 0.8: by a loop, or as a fixed point with these options."""

    def __init__(self, declared: dict[str, Any] | None = None) -> None:
        super().__init__()
        Q = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
        self.W, self.declared = nn.Parameter(Q @ torch.diag(torch.linspace(-0.5, 0.8, D).double()) @ Q.T), declared

    def body(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + x)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        if self.declared is not None:
            return fixed_point(lambda z: self.body(z, x), z, **self.declared)
        for _ in range(80):
            z = torch.tanh(z @ self.W.T + x)
        return z


def drawn(seed: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sites() -> list[Site]:
    declared = [site for known in eager._sites.values() for site in known.values()]
    return [site for site in (*living(), *declared) if site.calls]


@pytest.fixture(autouse=True)
def fresh() -> None:
    deq_compile.reset()


def tighten(calls: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the region tighten its tolerance in further calls, and change its mind about the forward's factors."""
    before = {site: site.backward_tol for site in sites()}
    monkeypatch.setattr(verdict, "GRADIENT_ERROR", 1e-6)
    calls()
    assert before
    assert all(site.backward_tol < tol for site, tol in before.items())
    for site in before:
        site.reuse(not site.reuses)


def hold(model: Model, run: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x, cotangents = drawn(1), (drawn(2), drawn(3))

    def gradient(z: Tensor, q: Tensor) -> Tensor:
        return torch.autograd.grad(z, model.W, q, retain_graph=True)[0]

    def more() -> None:
        for i in range(5):
            gradient(run(drawn(4 + i)), drawn(2))

    monkeypatch.setattr(verdict, "GRADIENT_ERROR", math.inf)
    early = run(x)
    first = [gradient(early, q) for q in cotangents]
    tighten(more, monkeypatch)
    for q, before in zip(cotangents, first, strict=True):
        assert torch.equal(gradient(early, q), before)
    late = run(x)  # its first backward is the one that measures, or not: the second is equal to it
    first = [gradient(late, q) for q in cotangents]
    for q, before in zip(cotangents, first, strict=True):
        assert torch.equal(gradient(late, q), before)


@pytest.mark.parametrize("more", MORE, ids=["", "recycle", "warm"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_of_a_declared_fixed_point(solver: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {name: value for name, value in more.items() if name != "semantics"}
    model = Model({"solver": solver, "verify": "periodic", **options})
    hold(model, model, monkeypatch)


def test_where_hooks_on_saved_tensors_hand_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    run, _ = compiled(model, tol=1e-6, backward_tol=None, verify="periodic", inner="eager")

    def copying(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy):
            out: Tensor = run(x)
        return out

    hold(model, copying, monkeypatch)


@pytest.mark.parametrize("more", MORE, ids=["", "recycle", "warm"])
@pytest.mark.parametrize(("inner", "solver"), [*(("eager", solver) for solver in SOLVERS), ("aot_eager", "auto")])
def test_of_a_compiled_loop(inner: str, solver: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    how = {"tol": 1e-6, "backward_tol": None, "inner": inner, "solver": solver, "verify": "periodic"}
    run, _ = compiled(model, **{**how, **more})
    hold(model, run, monkeypatch)


def test_the_first_backward_that_tightens_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model({})
    monkeypatch.setattr(verdict, "GRADIENT_ERROR", 1e-6)
    z, q = model(drawn(1)), drawn(2)
    first = torch.autograd.grad(z, model.W, q, retain_graph=True)[0]
    assert all(site.backward_tol < 1e-2 for site in sites())
    assert torch.equal(torch.autograd.grad(z, model.W, q, retain_graph=True)[0], first)


def by_hand() -> None:
    """Tighten what no measurement reaches."""
    found = [*sites(), *attach._twins.values()]
    assert found
    for site in found:
        site.backward_tol = 1e-6
        site.reuse(not site.reuses)


def test_of_a_second_derivative() -> None:
    model, q = Model({"derivatives": 2}), drawn(2)

    first = torch.autograd.grad(model(drawn(1)), model.W, q, create_graph=True)[0].square().sum()

    def second() -> Tensor:
        return torch.autograd.grad(first, model.W, retain_graph=True)[0]

    before = second()
    by_hand()
    assert torch.equal(second(), before)


def test_of_a_pull_back_of_torch_func() -> None:
    model, q = Model({}), drawn(2)
    pull = torch.func.vjp(model, drawn(1))[1]
    (before,) = pull(q)
    by_hand()
    assert torch.equal(pull(q)[0], before)


class Repelled(nn.Module):
    """A loop that never leaves a fixed point that repels: its value is a solve's, its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D).double()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(10):
            z = 0.01 * self.norm(z)
        return z


@pytest.mark.parametrize("order", [(0, 0), (1, 0), (1, 0, 1, 0)])
def test_a_gradient_that_was_seen_to_be_the_loops_stays_that(order: tuple[int, ...]) -> None:
    """Also for a forward that was made before it was seen."""
    model, x, q = Repelled(), drawn(1), drawn(2)
    run, report = compiled(model)
    right = torch.autograd.grad(model(x), model.norm.weight, q, allow_unused=True)[0]
    wanted = torch.autograd.grad(model(x), model.norm.bias, q)[0]
    outs = [run(x), run(x)]
    for which in order:
        weight, bias = torch.autograd.grad(outs[which], [model.norm.weight, model.norm.bias], q, retain_graph=True)
        torch.testing.assert_close(bias, wanted)
        torch.testing.assert_close(weight, right)
    assert [row.status for row in report.regions] == ["kept"]
