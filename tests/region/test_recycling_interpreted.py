"""Whole trainings that recycle, as a GPU would run them: kernels in the interpreter, graphs rehearsed, against float64.

Needs TRITON_INTERPRET=1 from the start: tests/kernels/test_triton.py runs it in a process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deq_compile
from bench.gpu.rehearse import RehearsalDevice
from deq_compile import fixed_point, record_solves
from deq_compile.kernels import device as kernel_device
from deq_compile.kernels.broyden import gpu as broyden_gpu
from deq_compile.kernels.gcr import gpu as gcr_gpu
from deq_compile.kernels.tiles import Tiles, by_shape
from deq_compile.region import counting, graphs
from deq_compile.region import pool as pools
from deq_compile.region import site as sites
from deq_compile.region.call import Call
from deq_compile.region.forward import Solution
from deq_compile.region.records import SolveRecord

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")
D = 24


@pytest.fixture(autouse=True)
def _only_once(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")
    monkeypatch.setattr(pools, "DECIDED_AT", (3,))
    monkeypatch.setattr(pools, "FED_BEFORE", (2, 1))
    for module in (broyden_gpu, gcr_gpu):
        monkeypatch.setattr(module, "tiles", small_tiles)


def small_tiles(B: int, D: int, steps: int, element_size: int = 4) -> Tiles:
    """The interpreter is slow, and masked columns cost it as much as others."""
    return Tiles(by_shape(B, D, steps, element_size).BM, 32, 32, 1, D, 2, 4)


class Slow(nn.Module):
    """60 iterations of tanh(W z + x), which is a fixed point to 1e-6: W symmetric, eigenvalues up to 0.85."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
        eigenvalues = torch.cat([torch.linspace(0.5, 0.85, 6), torch.linspace(-0.3, 0.3, D - 6)]).double()
        self.W = nn.Parameter(Q @ torch.diag(eigenvalues) @ Q.T)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = torch.tanh(z @ self.W + x)
        return z


def batch(i: int) -> Tensor:
    return 0.3 * torch.randn(2, D, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def exact(W: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """The gradient of (z target).sum() in W, by as many plain iterations as it takes."""
    W = W.detach().clone().requires_grad_()
    z = torch.zeros_like(x)
    for _ in range(200):
        z = torch.tanh(z @ W + x)
    return torch.autograd.grad((z * target).sum(), W)[0]


def train(steps: int, **options: Any) -> tuple[list[SolveRecord], list[Tensor]]:
    """Steps of gradient descent: records, and gradients, which are compared with the exact ones at the same weights."""
    torch._dynamo.reset()
    graphs.clear()
    model, found = Slow(), []
    settings = {"inner": "aot_eager", "tol": 1e-5, "backward_tol": 1e-5, "max_iter": 16, "verify": "never", "reuse": "never"}
    call = torch.compile(model, backend="deq", options={**settings, **options})
    with record_solves() as solves:
        for i in range(steps):
            (gradient,) = torch.autograd.grad((call(batch(i)) * batch(100)).sum(), model.W)
            torch.testing.assert_close(gradient, exact(model.W, batch(i), batch(100)), rtol=1e-3, atol=1e-4)
            found.append(gradient)
            with torch.no_grad():
                model.W.sub_(1e-3 * gradient)
    return solves, found


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def test_a_training_driven_by_the_host_decides_and_gains(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more launches an evaluation, of a body that has three, are not counted here: they would outweigh the adjoint's gain."""
    monkeypatch.setattr(counting, "THIN_LAUNCHES", 0)
    solves, _ = train(5, engine="loop", recycle="auto")
    assert [s.recycled for s in solves] == [False] * 3 + [True] * 2
    assert [s.recycled_adjoint for s in solves] == [False] * 3 + [True] * 2
    assert not graphs.held(graphs.Captured)
    monkeypatch.setattr(kernel_device, "_rehearsing", False)
    plain, _ = train(5, recycle="never")
    assert sum(s.iterations_max for s in solves[3:]) <= 0.8 * sum(s.iterations_max for s in plain[3:])
    assert sum(s.vjps or 0 for s in solves[4:]) < sum(s.vjps or 0 for s in plain[4:])


def test_graphs_read_the_pool(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured with a pool of one batch, replayed with that of another; bit for bit what the host's loop gives."""
    monkeypatch.setattr(pools, "FEED_EVERY", 4)
    by_host, expected = train(6, engine="loop", recycle="always")
    device.log.clear()
    solves, gradients = train(6, engine="while", recycle="always")
    assert equal(gradients, expected)
    assert [s.iterations_max for s in solves] == [s.iterations_max for s in by_host]
    assert [s.recycled for s in solves] == [s.recycled_adjoint for s in solves] == [False] + [True] * 5
    assert [h.name for h in graphs.held(graphs.CapturedForward)] == ["while"]
    assert [h.name for h in graphs.held(graphs.CapturedAdjoint)] == ["while"]
    # Calls 0 and 4 feed; 1 runs in the loop, 2 captures, 3 and 5 replay.
    assert device.log.count("warm") == 2


@pytest.mark.thorough
def test_graphs_put_what_the_forward_began_with_before_its_factors(device: type[RehearsalDevice]) -> None:
    """M of such factors stands for M P^-T: alone it needs half as many products more. A graph's certificate is one of its own."""
    by_host, expected = train(4, engine="loop", recycle="always", reuse="always")
    solves, gradients = train(4, engine="while", recycle="always", reuse="always")
    assert equal(gradients, expected)
    for found, certificates in ((by_host, [0] * 4), (solves, [0, 0, 1, 1])):
        assert all((s.vjps or 0) - more <= 8 for s, more in zip(found[1:], certificates[1:], strict=True))
        assert [s.reused for s in found] == [True] * 4
        assert [s.recycled_adjoint for s in found] == [False] + [True] * 3
    assert [h.name for h in graphs.held(graphs.CapturedAdjoint)] == ["while"]


def test_auto_is_off_where_a_graph_serves(device: type[RehearsalDevice]) -> None:
    solves, _ = train(4, engine="while", recycle="auto")
    assert not any(s.recycled or s.recycled_adjoint for s in solves)
    assert "nothing, since a CUDA graph serves and recycle is 'auto'" in {site.standing.recycle for site in sites.living()}
    assert [h.name for h in graphs.held(graphs.CapturedForward)] == ["while"]


@pytest.mark.thorough
def test_auto_is_on_where_no_graph_can_serve(device: type[RehearsalDevice]) -> None:
    """Which is known from the second call on."""
    device.refuse["capture"] = RuntimeError("operation not permitted when stream is capturing")
    solves, _ = train(6, recycle="auto")
    assert [s.recycled for s in solves] == [False] * 5 + [True]


def test_a_captured_solve_that_misses_is_solved_without(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pool is dropped: what goes out has the tolerance."""
    captured = Call.captured

    def spoilt(self: Call, shared: Any = None) -> Solution | None:
        found = captured(self, shared)
        if found is not None and shared is not None:
            found.outcome.outcome = lambda: (1, 40)  # type: ignore[union-attr,method-assign]
        return found

    monkeypatch.setattr(Call, "captured", spoilt)
    solves, _ = train(4, engine="while", recycle="always")
    assert [s.recycled for s in solves] == [False, True, False, False]


def test_backwards_through_one_forward_are_equal(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pool has learnt in between."""
    deq_compile.reset()
    made: list[pools.Pool] = []

    def pool_for(always: bool) -> pools.Pool:
        made.append(pools.Pool(always))
        return made[-1]

    monkeypatch.setattr(sites, "Pool", pool_for)
    W = Slow().W
    options = {"tol": 1e-5, "max_iter": 16, "verify": "never", "recycle": "always"}

    def solved(i: int) -> Tensor:
        return (fixed_point(lambda z: torch.tanh(z @ W + batch(i)), torch.zeros(2, D).double(), **options) * batch(100)).sum()

    torch.autograd.grad(solved(0), W)
    loss = solved(9)
    first = torch.autograd.grad(loss, W, retain_graph=True)[0]
    (pool,) = made
    before, pool.calls = pool.adjoint, 10
    torch.autograd.grad(solved(1), W)
    assert pool.adjoint is not before
    assert torch.equal(first, torch.autograd.grad(loss, W)[0])


def test_launches_count_where_they_may_be_all_there_is() -> None:
    """Two operators and a step are four launches, with the thin products six; of a longer body those are a smaller part."""
    z = torch.zeros(2, D)
    short, long = (lambda z: z.tanh().cos()), (lambda z: z.tanh().cos().sin().exp().tanh().cos().sin().exp())
    assert counting.dearer(short, z) == pytest.approx(6 / 4)
    assert counting.dearer(long, z) == pytest.approx(12 / 10)
