"""Captures that fail, under torch 2.11's rules: the next engine serves, with a reason, and torch is left as it was.

Needs TRITON_INTERPRET=1 from the start: tests/kernels/test_triton.py runs it in a process of its own.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.rehearse import RehearsalDevice
from bench.gpu.rules import STAGES, Fault
from deq_compile.region import graphs
from deq_compile.region.graphs import operands
from tests.region.rehearsed_loops import Loop
from tests.region.test_graphs_interpreted import compiled
from tests.region.test_graphs_interpreted import gradients as gradient

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")
FORWARD, ADJOINT = 2, 3  # captures of a `while`: trip and after; before, trip and after


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


def forwards(call: Any, x: Tensor) -> None:
    """Twice: the second call captures."""
    with torch.no_grad():
        for _ in range(2):
            call(x)


def example() -> tuple[Loop, Tensor]:
    torch.manual_seed(0)
    return Loop(5), torch.randn(1, 5)


@functools.cache
def from_the_loop() -> tuple[Tensor, Tensor]:
    """Value and gradient of the example in the loop engine: one reference for every way to fail."""
    model, x = example()
    found = gradient(compiled(model, engine="loop", verify="first"), model, x)
    torch._dynamo.reset()
    graphs.clear()
    return found


def engines() -> tuple[list[str], str]:
    names, reasons = graphs.used()
    return names, " | ".join(reasons)


def test_chunks_serve_where_while_is_refused_after_its_captures(device: type[RehearsalDevice]) -> None:
    """All of `while` was recorded; its graphs are gone when `chunks` begins, and the pool with them."""
    want, (model, x) = from_the_loop(), example()
    device.refuse["while_graph"] = graphs.Refused("the captured body has nodes of type Host")
    call = compiled(model, verify="first")
    for _ in range(3):
        got = gradient(call, model, x)
        device.rules.check()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert engines() == (["chunks"], "while: the captured body has nodes of type Host")


# Every capture, and every way to fail; test_graphs_captures.py has the ways in detail.
@pytest.mark.parametrize(
    ("stage", "at"), [*(("invalidated", at) for at in range(FORWARD + ADJOINT)), ("begin", 0), ("work", 1), ("instantiate", 3)]
)
def test_chunks_serve_whichever_capture_of_while_fails(stage: str, at: int, device: type[RehearsalDevice]) -> None:
    want, (model, x) = from_the_loop(), example()
    forward = at < FORWARD
    device.faults[at] = Fault(stage, RuntimeError("operation not permitted when stream is capturing\nmore"))
    call = compiled(model, verify="first")
    for _ in range(3):
        got = gradient(call, model, x)
        device.rules.check()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    (down,) = graphs.held(graphs.CapturedForward if forward else graphs.CapturedAdjoint)
    (well,) = graphs.held(graphs.CapturedAdjoint if forward else graphs.CapturedForward)
    assert (well.name, well.reason) == ("while", "")
    assert down.name == "chunks"
    assert down.reason == "while: RuntimeError: operation not permitted when stream is capturing"


@pytest.mark.parametrize("stage", STAGES)
def test_the_loop_serves_where_nothing_can_be_captured(stage: str, device: type[RehearsalDevice]) -> None:
    """And a region that is captured after it gets the best engine."""
    model, x = Loop(5), torch.randn(1, 5)
    device.faults.update(dict.fromkeys(range(2), Fault(stage)))
    call = compiled(model)
    forwards(call, x)
    reasons = [f"{name}: RuntimeError: CUDA error: refused in {stage}" for name in ("while", "chunks")]
    assert engines() == (["loop"], "; ".join(reasons))
    device.rules.random()
    other = Loop(6)
    forwards(compiled(other), torch.randn(1, 6))
    assert engines()[0] == ["loop", "while"]


@pytest.mark.parametrize("last", [3, 4], ids=["before", "chunk"])
def test_an_adjoint_that_cannot_be_captured_runs_in_the_loop(last: int, device: type[RehearsalDevice]) -> None:
    """`while` fails in its first capture, `chunks` in one of its two; the forward keeps its engine."""
    want, (model, x) = from_the_loop(), example()
    device.faults.update({FORWARD: Fault("invalidated"), last: Fault("work")})
    call = compiled(model, verify="first")
    for _ in range(3):
        got = gradient(call, model, x)
        device.rules.check()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    (declined,) = graphs.held(graphs.Declined)
    refused = "RuntimeError: CUDA error: refused in"
    assert declined.reason == f"while: {refused} invalidated; chunks: {refused} work"
    assert [held.name for held in graphs.held(graphs.CapturedForward)] == ["while"]


def test_an_interruption_comes_through_and_breaks_nothing(device: type[RehearsalDevice]) -> None:
    model, x = Loop(5), torch.randn(1, 5)
    device.faults[0] = Fault("work", KeyboardInterrupt())
    call = compiled(model)
    with torch.no_grad():
        want = call(x)
        with pytest.raises(KeyboardInterrupt):
            call(x)
        device.rules.check()
        torch.testing.assert_close(call(x), want, rtol=0, atol=0)
    assert engines() == (["while"], "")


@pytest.mark.parametrize("what", [(RehearsalDevice, "warm"), (torch, "empty_strided")], ids=["a body", "copies of operands"])
def test_the_loop_serves_where_memory_is_wanting(
    what: tuple[Any, str], device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Loop(5), torch.randn(1, 5)

    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    call = compiled(model)
    with torch.no_grad():
        want = call(x)
        monkeypatch.setattr(*what, full)
        for _ in range(2):
            torch.testing.assert_close(call(x), want, rtol=0, atol=0)
    assert engines() == (["loop"], "OutOfMemoryError: CUDA out of memory")


def test_an_error_while_operands_are_brought_in_frees_the_solve(
    device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Loop(5), torch.randn(1, 5)
    call = compiled(model)
    forwards(call, x)
    (held,) = graphs.held(graphs.CapturedForward)

    def full(*tensors: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(operands, "foreach_copy_", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(x)
    assert not held.busy.locked()
    replays = device.log.count("replay")
    with torch.no_grad():
        call(x)
    assert device.log.count("replay") > replays


@pytest.mark.parametrize("kind", [graphs.CapturedForward, graphs.CapturedAdjoint], ids=["forward", "adjoint"])
def test_the_loop_serves_where_a_launch_is_refused(kind: Any, device: type[RehearsalDevice]) -> None:
    """The first launch of a graph takes memory of its own."""
    model, x = Loop(5), torch.randn(1, 5)
    call = compiled(model, verify="first")
    for _ in range(3):
        want = gradient(call, model, x)
    (held,) = graphs.held(kind)

    def full() -> None:
        raise RuntimeError("CUDA said cudaErrorMemoryAllocation to the launch of a captured solve")

    held.engine.graph.replay = full
    for _ in range(2):
        for mine, theirs in zip(gradient(call, model, x), want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert (held.name, held.busy.locked()) == ("loop", False)
    assert "cudaErrorMemoryAllocation" in held.reason


def test_another_stream_waits_for_the_warming_up(device: type[RehearsalDevice]) -> None:
    """A solve that is made and not used yet counts as one at work: its buffers are being written on its maker's stream."""
    model, x = Loop(5), torch.randn(1, 5)
    call = compiled(model)
    with torch.no_grad():
        call(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs.CapturedForward, "solve", lambda *_, **__: None)
            call(x)
    (held,) = graphs.held(graphs.CapturedForward)
    assert held.launched is not None
