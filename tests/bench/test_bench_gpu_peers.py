"""What `python -m bench gpu` steps, and what it is held against: workloads, the float64 reference, and the peers."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.gpu import peer_jax, reference, workloads
from bench.gpu.clocks import COVER, MOST_FLUSHES, Clocks
from bench.gpu.common import Setting
from bench.gpu.peer_torchdeq import TorchDEQ
from bench.gpu.peer_while import TorchWhile, split
from bench.gpu.plan import PLAN
from bench.gpu.store import Store

NAMES = [g.name for g in PLAN if g.part == "steps"]
LARGE = ("lm", "mdeq", "flow", "graph")


def small(name: str) -> workloads.Workload:
    """The rehearsal's size, in full precision and to a tight tolerance."""
    found = workloads.make(name, dry=True)
    found.autocast, found.tol = None, 1e-5
    return found


def step(module: nn.Module, workload: workloads.Workload) -> tuple[Tensor, Tensor]:
    module.zero_grad(set_to_none=True)
    out = module(*workload.inputs)
    workload.loss(out).backward()
    return out.detach().double(), reference.gradient(module)


def errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", ["mlp128", *LARGE])
def test_the_reference_is_the_loops_own_limit(name: str) -> None:
    """Value and gradient of backpropagation through 200 plain iterations in float64."""
    workload = small(name)
    model = copy.deepcopy(workload.model).double()
    model.n_iter = 200
    exact = reference.exact(workload)
    double = copy.copy(workload)
    double.inputs = tuple(t.double() if t.is_floating_point() else t for t in workload.inputs)
    assert max(errors(step(model, double), exact)) < 1e-7


def test_a_body_that_does_not_converge_has_no_reference() -> None:
    workload = small("mlp128")
    with torch.no_grad():
        for p in workload.model.parameters():
            p.mul_(100)
    with pytest.raises(reference.NotReached, match="expected the state to converge"):
        reference.exact(workload)


@pytest.mark.parametrize("name", NAMES)
def test_workloads_are_at_their_fixed_point_when_the_loop_ends(name: str) -> None:
    """Or a solve could not stand in for the loop, and nothing would be measured."""
    workload = small(name)
    assert errors(step(workload.model, workload), reference.exact(workload))[0] < 3e-3


def test_a_rehearsal_has_the_bodies_of_the_real_workloads() -> None:
    """The same modules, small: what a convolution or an attention does under an engine is seen before a device is paid for."""

    for name in set(NAMES) - set(LARGE):  # those are made by one function for both
        small, real = ({type(module) for module in workloads.make(name, dry).model.modules()} for dry in (True, False))
        assert small == real, name


def test_shapes_are_the_cited_ones() -> None:
    mdeq = workloads.make("mdeq", dry=False)
    z = mdeq.model.start(mdeq.model.inject(mdeq.inputs[0][:1]))
    assert (sum(t[0].numel() for t in z), len(mdeq.inputs[0])) == (61440, 32)
    assert [tuple(t.shape[1:]) for t in z] == [(32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)]
    flow = workloads.make("flow", dry=False)
    z = flow.model.start((flow.inputs[2],))
    assert (sum(t[0].numel() for t in z), len(flow.inputs[0])) == (585000, 3)
    lm = workloads.make("lm", dry=False)
    assert (tuple(lm.inputs[0].shape), lm.autocast) == ((8, 512, 768), torch.bfloat16)
    assert workloads.make("graph", dry=False).inputs[0].shape[0] == 2373
    with pytest.raises(KeyError, match="expected a problem"):
        workloads.make("nothing", dry=True)


@pytest.mark.parametrize("name", ["mlp128", *LARGE])
def test_torchdeqs_formulation_has_the_implicit_gradient(name: str) -> None:
    workload = small(name)
    found = step(TorchDEQ(copy.deepcopy(workload.model), workload.tol), workload)
    assert max(errors(found, reference.exact(workload))) < 2e-3


@pytest.mark.parametrize("name", ["mlp128", "graph"])
def test_torchs_while_loop_has_the_implicit_gradient(name: str) -> None:
    """Twice, with other weights in between: what was traced takes weights and inputs as arguments."""
    workload = small(name)
    peer = TorchWhile(copy.deepcopy(workload.model), workload.tol, dry=True)
    assert max(errors(step(peer, workload), reference.exact(workload))) < 2e-3
    assert 1 < peer.iterations < 40
    with torch.no_grad():
        for own, other in zip(workload.model.parameters(), peer.model.parameters(), strict=True):
            other.copy_(own.mul_(0.8))
    assert max(errors(step(peer, workload), reference.exact(workload))) < 2e-3


def test_what_does_not_depend_on_the_cotangent_leaves_the_loop() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def product(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return w * torch.tanh(a @ b) + a

    w, a, b = torch.randn(3, 3), torch.randn(3, 3), torch.randn(3, 3)
    first, second, takes, passes = split(make_fx(product)(w, a, b))
    given = (w, a, b)
    kept = [*(given[i] for i in passes), *first(*(given[i] for i in takes))]
    torch.testing.assert_close(second(w, *kept), product(w, a, b))
    inside = {str(n.target) for m in second.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes}
    assert "aten.mul.Tensor" in inside
    assert not inside & {"aten.mm.default", "aten.tanh.default"}


@pytest.mark.parametrize("way", ["JAX: Broyden, jitted", "JAX: optimistix, jitted", "JAX: jaxopt, jitted"])
def test_jax_has_the_implicit_gradient(way: str) -> None:
    for package in peer_jax.WAYS[way][1]:
        pytest.importorskip(package)
    workload = small("mlp128")
    exact = reference.exact(workload)
    peer_jax.ready(way, workload, dry=True)
    peer = peer_jax.JaxStep(way, copy.deepcopy(workload))
    peer()
    assert max(errors(peer.read(), exact)) < 2e-3


def test_jax_says_why_it_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(peer_jax.Missing, match="not written in JAX"):
        peer_jax.ready("JAX: Broyden, jitted", small("mdeq"), dry=True)
    monkeypatch.setitem(peer_jax.WAYS, "x", (peer_jax.PlainBroyden, ("no_such_package",)))
    with pytest.raises(peer_jax.Missing, match="not installed: no_such_package"):
        peer_jax.ready("x", small("mlp128"), dry=True)


# Steps


def test_a_peer_that_fails_is_told_and_the_next_way_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import steps, ways

    def make(setting: Setting, name: str, workload: workloads.Workload) -> ways.Way:
        raise ways.Skipped("not here") if name == ways.EAGER else RuntimeError("cannot")

    monkeypatch.setattr(ways, "make", make)
    monkeypatch.setattr(ways, "DRY", (ways.EAGER, ways.PEER, ways.OURS))
    setting = Setting("steps", "mlp128", Store(tmp_path / "rows.json"), True, time.time() + 60)
    steps.run(setting)
    told = [{k: r[k] for k in ("skipped", "failed", "error") if k in r} for r in setting.store.read()["rows"]]
    assert told == [{"skipped": "not here"}, {"failed": "RuntimeError: cannot"}, {"error": "RuntimeError: cannot"}]


class FakeDevice(Clocks):
    """A device whose flush takes 400 µs by its own clock; counts how often memory is cleared."""

    dry, device = False, torch.device("cpu")

    def __init__(self) -> None:
        self.cleared = 0
        owner = self

        class Flush:
            def zero_(self) -> None:
                owner.cleared += 1

        self._flush = (Flush(), 400.0)  # type: ignore[assignment]


class FakeEvent:
    reached = False

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, other: Any) -> float:
        return 0.25


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return FakeDevice()  # type: ignore[return-value]


@pytest.mark.parametrize(("host_us", "fewest"), [(100, 1), (4000, 20), (10**6, MOST_FLUSHES)])
def test_the_flush_outlasts_the_host(fake_cuda: FakeDevice, host_us: int, fewest: int) -> None:
    """The device is busy for twice the host's time, so that an event's time holds none of it; what is not covered says so."""
    if host_us == 10**6:
        fake_cuda._host = lambda work, reset: 1e6  # type: ignore[method-assign, assignment]
    timing = fake_cuda.timed(lambda: time.sleep(host_us * 1e-6) if host_us < 10**6 else None, repeats=1)
    assert timing.device == 250.0
    assert timing.covered
    assert fake_cuda.cleared >= fewest
    assert fake_cuda.cleared == MOST_FLUSHES or fake_cuda.cleared * 400 >= COVER * timing.host
    FakeEvent.reached = True
    try:
        assert not fake_cuda.timed(lambda: None, repeats=1).covered
    finally:
        FakeEvent.reached = False
