"""Devices, operands elsewhere, the random generator, and the two ways to end a WHILE node, in Triton's interpreter.

Needs TRITON_INTERPRET=1 from the start: tests/kernels/test_triton.py runs it in a process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.rehearse import RehearsalDevice
from deq_compile import explain, fixed_point
from deq_compile.kernels.broyden import gpu as broyden_gpu
from deq_compile.kernels.gcr import gpu as gcr_gpu
from deq_compile.region import graphs
from deq_compile.region.graphs import engines
from deq_compile.region.site import Site
from tests.region.rehearsed_loops import ScaledLoop as Loop

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")
OPTIONS = {"inner": "aot_eager", "tol": 1e-3, "max_iter": 8}


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


def train(call: Any, x: Tensor) -> Tensor:
    y = call(x)
    y.square().sum().backward()
    return y.detach()


@pytest.fixture
def launches(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every launch, whether it came under the state's device."""
    seen: list[bool] = []
    original = broyden_gpu.launch

    def launch(*args: Any, **constants: Any) -> None:
        seen.append(device.inside > 0)
        original(*args, **constants)

    monkeypatch.setattr(broyden_gpu, "launch", launch)
    monkeypatch.setattr(gcr_gpu, "launch", launch)
    return seen


@pytest.mark.parametrize("wanted", ["loop", "while", "chunks"])
def test_launches_happen_under_the_states_device(wanted: str, launches: list[bool]) -> None:
    """Triton launches on the current device, whichever that is."""
    model, x = Loop(), torch.randn(1, 5)
    call = torch.compile(model, backend="deq", options={**OPTIONS, "engine": wanted, "verify": "first"})
    for _ in range(3):
        train(call, x)
    assert len(launches) > 10
    assert all(launches)
    if wanted != "loop":
        assert {held.name for held in graphs.held(graphs.Captured)} == {wanted}


def test_a_declared_fixed_point_launches_under_the_states_device(launches: list[bool], device: type[RehearsalDevice]) -> None:
    """In eager mode; the function itself runs under the caller's."""
    model, x = Loop(), torch.randn(1, 5)
    seen: list[int] = []

    def f(z: Tensor) -> Tensor:
        seen.append(device.inside)
        return torch.tanh(model.W(z) + model.U(x))

    train(lambda x: fixed_point(f, torch.zeros_like(x), tol=1e-3, max_iter=8), x)
    assert len(launches) > 5
    assert all(launches)
    assert seen


def test_operands_elsewhere_stay_in_the_loop(device: type[RehearsalDevice]) -> None:
    """A number on the CPU would be read once and for all, by the capture."""
    device.on_host = staticmethod(lambda tensor: tensor.dim() == 0)
    model, x = Loop(), torch.randn(1, 5)
    call = torch.compile(model, backend="deq", options=OPTIONS)
    with torch.no_grad():
        for number in (1.0, 0.5, 0.25):
            scale = torch.tensor(number)
            torch.testing.assert_close(call(x, scale), model(x, scale), rtol=0, atol=3e-3)
        report = explain(model, **OPTIONS)(x, torch.tensor(0.5))
    reason = "an operand of shape [] is on meta: a graph on cpu would keep the value it has now"
    assert graphs.used() == (["loop"], [reason])
    assert "begin" not in device.log
    assert (report.regions[0].engine, report.regions[0].engine_reason) == ("loop", reason)
    assert f"loop, since {reason}" in str(report)


def test_capturing_draws_no_random_numbers(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forwards nor adjoints: the loop engine draws none either, so masks of a dropout are the same with both."""
    model, x = Loop(), torch.randn(1, 5)
    call = torch.compile(model, backend="deq", options={**OPTIONS, "verify": "first"})
    state = torch.get_rng_state()
    for _ in range(3):
        train(call, x)
    assert {type(held) for held in graphs.held(graphs.Captured)} == {graphs.CapturedForward, graphs.CapturedAdjoint}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_flag_may_decide_about_the_loop(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise the same, forward and backward; `explain` and the log say which structure ran."""
    model, x = Loop(), torch.randn(1, 5)
    options = {**OPTIONS, "verify": "first", "engine": "while"}

    def three(call: Any) -> list[Tensor]:
        out = []
        for _ in range(3):
            model.zero_grad()
            y = train(call, x)
            assert model.W.weight.grad is not None
            out += [y, model.W.weight.grad.clone()]
        return out

    want = three(torch.compile(model, backend="deq", options=options))
    trips = [line for line in device.log if line.startswith("trips")]
    assert "decide" not in device.log
    monkeypatch.setattr(engines, "STRUCTURE", "flag")
    torch._dynamo.reset()
    device.log.clear()
    notes: list[tuple[str, str]] = []
    use = Site.note_engine

    def noted(self: Site, name: str, reason: str) -> None:
        notes.append((name, reason))
        use(self, name, reason)

    monkeypatch.setattr(Site, "note_engine", noted)
    got = three(torch.compile(model, backend="deq", options=options))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert [line for line in device.log if line.startswith("trips")] == trips
    assert device.log.count("decide") == sum(int(line.split()[1]) for line in trips)
    assert all(held.engine.graph.flagged for held in graphs.held(graphs.Captured))  # type: ignore[union-attr]
    assert notes[-1] == ("while", "while: a node of the loop's own sets the condition, from a flag")


def test_an_adjoint_keeps_no_operand_alive(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the body saved of an operand that is read in place is lent by each call, and gone after it."""
    from deq_compile.region.graphs import operands as module

    monkeypatch.setattr(module, "SMALL_BYTES", 90)  # W.weight, 100 bytes, is read in place
    model, x = Loop(), torch.randn(1, 5)
    call = torch.compile(model, backend="deq", options={**OPTIONS, "verify": "first"})
    for _ in range(3):
        train(call, x)
    (held,) = graphs.held(graphs.CapturedAdjoint)
    assert held.operands.fixed
    linear, w = held.linear, torch.randn(1, 5)
    want = linear.vjp_full(w)
    given = list(held.operands.tensors)
    fixed = {given[i].untyped_storage().data_ptr() for i in held.operands.fixed}

    def kept() -> set[int]:
        saved = [t.untyped_storage().data_ptr() for t in held.linear.saved if isinstance(t, Tensor)]
        return fixed & {*saved, *(t.untyped_storage().data_ptr() for t in held.operands.tensors)}

    assert kept()
    held.let_go()
    assert not kept()
    assert held.enter(given)
    lent = held.linear
    held.leave()
    assert not kept()
    got = lent.vjp_full(w)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    for mine, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
