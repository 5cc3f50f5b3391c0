"""The engines end to end without a GPU: real kernels in Triton's interpreter, stand-ins for streams, events and graphs.

Needs TRITON_INTERPRET=1 from the start: tests/kernels/test_triton.py runs it in a process of its own.
"""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.gpu.rehearse import RehearsalDevice
from deq_compile import explain, record_solves
from deq_compile.backend import Backend
from deq_compile.region import graphs
from deq_compile.region.compiled import CompiledLinearised, CompiledRunner
from deq_compile.region.graphs import captures
from tests.region.rehearsed_loops import Loop

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="deq", options={"inner": "aot_eager", "tol": 1e-3, "max_iter": 8, **options})


def gradients(call: Any, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return y.detach(), model.W.weight.grad.clone()  # type: ignore[union-attr,operator]


def test_captured_solves_equal_the_loop(device: type[RehearsalDevice]) -> None:
    """Bitwise, forward and backward: the same kernels in the same order. What measures a gradient is not captured."""
    model = Loop()
    xs = [torch.randn(2, 17) for _ in range(3)]  # the loop, the capture, a replay
    expected = [gradients(compiled(model, engine="loop", verify="first"), model, x) for x in xs]
    assert not graphs.held(graphs.Captured)
    for wanted in ("while", "chunks"):
        torch._dynamo.reset()
        graphs.clear()
        call = compiled(model, engine=wanted, verify="first")
        for x, (y, g) in zip(xs, expected, strict=True):
            mine, grad = gradients(call, model, x)
            torch.testing.assert_close(mine, y, rtol=0, atol=0)
            torch.testing.assert_close(grad, g, rtol=0, atol=0)
        assert [h.name for h in graphs.held(graphs.CapturedForward)] == [wanted]
        assert [h.name for h in graphs.held(graphs.CapturedAdjoint)] == [wanted]


def test_nothing_stands_between_begin_and_end(device: type[RehearsalDevice]) -> None:
    model = Loop()
    call = compiled(model)
    with torch.no_grad():
        call(torch.randn(2, 17))
        assert device.log == []  # the first solve of a key runs in the loop
        call(torch.randn(2, 17))
    capture = ["clear", "begin", "end", "clear"]
    assert device.log[:9] == ["warm", *capture, *capture]
    trips = next(int(line.split()[1]) for line in device.log if line.startswith("trips"))
    assert 3 <= trips <= 8
    assert device.log.count("replay") == trips + 1


def test_two_forwards_before_two_backwards(device: type[RehearsalDevice]) -> None:
    """Outputs share nothing, with each other or with static memory."""
    model = Loop()
    call = compiled(model)
    first = torch.randn(2, 17)
    gradients(call, model, first)
    x1, x2 = torch.randn(2, 17, requires_grad=True), torch.randn(2, 17, requires_grad=True)
    y1 = call(x1)
    kept = y1.detach().clone()
    y2 = call(x2)
    torch.testing.assert_close(y1.detach(), kept, rtol=0, atol=0)
    y1.sum().backward()
    y2.sum().backward()
    for x in (x1, x2):
        alone = x.detach().clone().requires_grad_()
        call(alone).sum().backward()
        torch.testing.assert_close(x.grad, alone.grad, rtol=0, atol=0)


def test_refusals_step_down_with_a_reason(device: type[RehearsalDevice]) -> None:
    model, x = Loop(), torch.randn(2, 17)
    want = compiled(model, engine="loop")(x)
    device.refuse["while"] = graphs.Refused("no conditional nodes here")
    with torch.no_grad():
        torch._dynamo.reset()
        call = compiled(model)
        for _ in range(2):
            torch.testing.assert_close(call(x), want, rtol=0, atol=0)
    (held,) = graphs.held(graphs.CapturedForward)
    assert (held.name, held.reason) == ("chunks", "while: no conditional nodes here")
    graphs.clear()
    device.refuse["capture"] = RuntimeError("operation not permitted when stream is capturing\nmore")
    report = explain(model, inner="aot_eager", tol=1e-3, max_iter=8)
    with torch.no_grad():
        torch._dynamo.reset()
        call = compiled(model)
        for _ in range(3):
            torch.testing.assert_close(call(x), want, rtol=0, atol=0)
    (declined,) = graphs.held(graphs.Declined)  # without the buffers of a solve
    assert declined.name == "loop"
    assert "chunks: RuntimeError: operation not permitted when stream is capturing" in declined.reason
    assert report(x).regions[0].engine == "loop"


def test_a_parameter_that_moves_is_copied_in_the_end(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    from deq_compile.region.graphs import operands

    monkeypatch.setattr(operands, "SMALL_BYTES", 200)  # the bias is small, the weight is read in place
    model, x = Loop(), torch.randn(2, 17)
    call = compiled(model)

    def held() -> graphs.CapturedForward:
        (found,) = graphs.held(graphs.CapturedForward)
        return found

    with torch.no_grad():
        for _ in range(2):
            call(x)
        first = held()
        assert first.operands.fixed
        for moves in (1, 2):
            model.W.weight.data = model.W.weight.data.clone() * 0.9
            torch.testing.assert_close(call(x), model(x), rtol=0, atol=2e-3)
            assert held() is first
            assert first.operands.misses == moves
        model.W.weight.data = model.W.weight.data.clone() * 0.9
        torch.testing.assert_close(call(x), model(x), rtol=0, atol=2e-3)
    assert held() is not first
    assert set(first.operands.moved) <= set(held().operands.copied)


def test_other_shapes_capture_anew_and_the_number_is_bounded(
    device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captures, "MOST", 2)
    model = Loop()
    call = compiled(model)
    with torch.no_grad():
        for batch in (1, 2, 3):
            for _ in range(2):
                x = torch.randn(batch, 17)
                torch.testing.assert_close(call(x), model(x), rtol=0, atol=2e-3)
    assert len(captures._found) == 2


def test_two_threads_never_share_one(device: type[RehearsalDevice]) -> None:
    model, x = Loop(), torch.randn(2, 17)
    call = compiled(model)
    with torch.no_grad():
        want = [call(x) for _ in range(2)][-1]
        (held,) = graphs.held(graphs.CapturedForward)
        with held.busy:  # as if another thread were in it
            replays = device.log.count("replay")
            torch.testing.assert_close(call(x), want, rtol=0, atol=0)
            assert device.log.count("replay") == replays
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(call(x) for _ in range(2))

    other = threading.Thread(target=work)
    other.start()
    other.join()
    assert all(torch.equal(r, want) for r in results)
    assert len(captures._found) == 2


def test_under_somebody_elses_capture(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly max_iter bodies and backward_max_iter VJPs, nothing asked, nothing captured; before the first call a refusal."""
    model, x = Loop(), torch.randn(2, 17)
    call = compiled(model, backward_max_iter=3)
    monkeypatch.setattr(device, "captured_by_others", True)
    with pytest.raises(RuntimeError, match="run the model once"), torch.no_grad():
        call(x)
    monkeypatch.setattr(device, "captured_by_others", False)
    want, gradient = gradients(call, model, x)
    device.log.clear()
    monkeypatch.setattr(device, "captured_by_others", True)
    bodies, vjps = [], []
    apply, vjp = CompiledRunner.apply, CompiledLinearised.vjp
    monkeypatch.setattr(CompiledRunner, "apply", lambda *args: (bodies.append(0), apply(*args))[1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(CompiledLinearised, "vjp", lambda *args: (vjps.append(0), vjp(*args))[1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a question to the device"))
    got, again = gradients(call, model, x)
    assert len(bodies) == 8
    assert len(vjps) == 3
    assert device.log == []
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(again, gradient, rtol=1e-2, atol=1e-4)


def test_what_a_solve_came_to_is_told_at_the_next_call(device: type[RehearsalDevice]) -> None:
    """A captured solve is not waited for: a missed tolerance is counted, and warned of, one call late."""
    model, x = Loop(), torch.randn(2, 17)
    call = compiled(model, max_iter=6, semantics="equilibrium")
    with torch.no_grad():
        call(x)
        call(x)
        model.W.weight.mul_(3.9)
        call(x)
        with pytest.warns(UserWarning, match="missed tol=0.001 within max_iter=6"):
            call(x)
    with record_solves() as solves, torch.no_grad():
        call(x)
    assert solves[0].converged == 0.0
    assert solves[0].iterations_max == 6


def test_captured_solves_go_with_their_region(device: type[RehearsalDevice]) -> None:
    """One that is still at work stays until another region goes, or a solve is looked up."""
    options = {"inner": "aot_eager", "tol": 0.5, "max_iter": 3, "semantics": "equilibrium"}
    made: list[Any] = []

    def spy(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(Backend(options)(gm, inputs))
        return lambda *args: made[0](*args)

    x = torch.randn(2, 5)
    with torch.no_grad():
        call = torch.compile(Loop(5), backend=spy)
        for _ in range(2):
            call(x)
        (forward,) = graphs.held(captures.Captured)
        forward.busy.acquire()
        made.clear()
        gc.collect()
        assert graphs.held(captures.Captured) == [forward]
        forward.busy.release()
        captures._orphan("another region")
    assert graphs.held(captures.Captured) == []
