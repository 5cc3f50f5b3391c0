"""Captures and captured solves without kernels: what a failed capture leaves, what is waited for, what is bounded, settings."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.rehearse import RehearsalDevice, rehearsed
from bench.gpu.rules import STAGES, Fault
from deq_compile import torch_parts
from deq_compile.region.graphs import captures
from deq_compile.region.graphs import device as device_module
from deq_compile.region.graphs.borrowed import Borrowed
from deq_compile.region.graphs.captured import Captured, Declined
from deq_compile.region.graphs.operands import Operands, addresses


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


@pytest.fixture
def device() -> Iterator[type[RehearsalDevice]]:
    with rehearsed() as found:
        yield found


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_capture_leaves_nothing(stage: str, device: type[RehearsalDevice]) -> None:
    """Neither a pool that is being recorded to, nor a generator that takes itself for captured, nor a pool released twice."""
    mine, x = device(torch.device("cpu")), torch.zeros(1)
    device.faults[1] = Fault(stage)
    graphs = [mine.capture(lambda: x.add_(1) and None)]
    with pytest.raises(RuntimeError, match=f"refused in {stage}"):
        mine.capture(lambda: x.add_(1) and None)
    device.rules.check()
    graphs.append(mine.capture(lambda: x.add_(1) and None))
    x.zero_()
    for graph in graphs:
        graph.replay()
    assert int(x) == 2
    graphs.clear()
    del graph
    gc.collect()
    assert device.rules.users
    assert not any(device.rules.users.values())


def test_healing_that_fails_is_said(device: type[RehearsalDevice], caplog: pytest.LogCaptureFixture) -> None:
    """And does not hide why the capture failed; pools are ended all the same."""
    mine, x = device(torch.device("cpu")), torch.zeros(1)
    device.faults[0] = Fault("invalidated")

    class Stuck:
        def zero_(self) -> None:
            raise RuntimeError("the stream is stuck")

    mine.one = Stuck()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="refused in invalidated"), caplog.at_level("WARNING", "deq_compile.region"):
        mine.capture(lambda: x.zero_() and None)
    assert "random numbers may be refused from now on" in caplog.text
    assert "the stream is stuck" in caplog.text
    assert not device.rules.underway
    device.rules.check()


def test_a_pool_is_dead_when_its_graphs_are_gone(device: type[RehearsalDevice]) -> None:
    """As torch has it: so every attempt begins with a pool of its own. Where one did not, nothing else breaks."""
    mine, x = device(torch.device("cpu")), torch.zeros(1)
    mine.capture(lambda: x.zero_() and None)
    gc.collect()
    with pytest.raises(RuntimeError, match="use_count > 0"):
        mine.capture(lambda: x.zero_() and None)
    device.rules.check()
    mine.capture(lambda: x.zero_() and None)
    mine.new_pool()
    mine.capture(lambda: x.zero_() and None)


SETTINGS = {
    "the newer names": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "for all backends": "torch.backends.fp32_precision = 'tf32'",
    "convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "recurrent nets": "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
    "the older function": "torch.set_float32_matmul_precision('high')",
    "the older flag": "torch.backends.cuda.matmul.allow_tf32 = False",
    "cuDNN's older flag": "torch.backends.cudnn.allow_tf32 = False",
    "sums in half precision": "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False",
    "sums in bfloat16": "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False",
    "split sums": "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)",
    "accumulating in half precision": "torch.backends.cuda.matmul.allow_fp16_accumulation = True",
    "both ways": "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.fp32_precision = 'ieee'",
}


def test_settings_are_read_under_both_precision_interfaces() -> None:
    """Each of them changes the key of a captured solve; none makes reading raise. A process for all: settings are global."""
    program = (
        "import sys, torch\nfrom deq_compile.region.graphs.device import Device\n"
        "for line in sys.argv[1:]:\n    before = Device.settings()\n    exec(line)\n"
        "    assert hash(Device.settings()) and Device.settings() != before, line\n"
    )
    order = [line for name, line in SETTINGS.items() if "older" in name]  # an older name after a newer one raises in torch
    order += [line for line in SETTINGS.values() if line not in order]
    done = subprocess.run([sys.executable, "-c", program, *order], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_setting_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that drops one of the names, or has not got it yet, still captures."""
    monkeypatch.setattr(torch_parts, "_CUDA_SETTINGS", (("backends.cuda.matmul", "no_such_setting"), ("backends.nowhere", "a")))
    assert torch_parts.cuda_settings()[:2] == (None, None)


def test_the_collector_rests_until_the_last_recording_ends() -> None:
    """Whichever thread began, and whichever ends first; a collector that was off stays so."""
    with device_module.collector_paused():
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            first.enter_context(device_module.collector_paused())
            second.enter_context(device_module.collector_paused())
            first.close()
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with device_module.collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_thread_has_one_capturing_stream_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that warming up leaves to a stream serve the next solve; two threads may record at a time."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(device_module, "_of_thread", threading.local())
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    streams = [device_module._side(d) for d in (here, there, here)]
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.append(device_module._side(here)))
    thread.start()
    thread.join()
    assert streams[0] is streams[2]
    assert len({id(stream) for stream in (*streams, *other)}) == 3


class Event:
    def __init__(self, log: list[str], done: bool) -> None:
        self.log, self.done = log, done

    def record(self) -> None:
        self.log.append("record")

    def query(self) -> bool:
        self.log.append("query")
        return self.done

    def synchronize(self) -> None:
        self.log.append("wait")
        self.done = True


class Solve(Captured):
    """A captured solve of a given size, whose last launch may still be at work."""

    def __init__(self, log: list[str], size: int = 0, done: bool = True) -> None:
        super().__init__(RehearsalDevice(torch.device("cpu")), Operands([], [], frozenset()))
        self.launched, self.size = Event(log, done), size
        self.engine = SimpleNamespace(name="while")  # type: ignore[assignment]

    def bytes(self) -> int:
        return self.size


def look_up(name: str, operands: list[Tensor], build: Any) -> Any:
    return captures.find((name,), torch.zeros(2, 3), operands, "auto", build)


def test_a_hopeless_solve_is_waited_for_and_gone_before_the_next_is_made(
    device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its graphs are not taken from under a running device, and memory is needed for one of them at a time."""
    log: list[str] = []
    first = Solve(log, done=False)
    x = torch.zeros(3)
    assert look_up("a", [x], None) is None
    assert look_up("a", [x], lambda *_: first) is first
    first.operands.misses, first.operands.moved = 2, {0}

    def build(_: Any, operands: Operands) -> Solve:
        log.append(f"build, {len(engines())} held")
        assert operands.copied == [0]
        return Solve(log)

    def engines() -> list[Solve]:
        return [s for s in captures._found.values() if isinstance(s, Solve)]

    assert look_up("a", [x], build) is not first
    assert log == ["wait", "build, 0 held"]


def test_clear_waits(device: type[RehearsalDevice]) -> None:
    log: list[str] = []
    look_up("a", [], None)
    look_up("a", [], lambda *_: Solve(log, done=False))
    captures.clear()
    assert log == ["wait"]
    assert not captures._found


def test_captured_solves_are_bounded_by_bytes(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle ones go, the oldest first; neither one at work nor the newest, however large."""
    monkeypatch.setattr(device, "memory", staticmethod(lambda _: 400))  # a quarter of them for captured solves
    log: list[str] = []

    def names() -> list[str]:
        return [key[0] for key in captures._found]

    for name, size, done in [("busy", 40, False), ("old", 30, True), ("young", 30, True)]:
        for _ in range(2):
            look_up(name, [], lambda *_, s=size, d=done: Solve(log, s, d))
    assert names() == ["busy", "old", "young"]
    for _ in range(2):
        look_up("more", [], lambda *_: Solve(log, 20))
    assert names() == ["busy", "young", "more"]
    for _ in range(2):
        look_up("huge", [], lambda *_: Solve(log, 1000))
    assert names() == ["busy", "huge"]


def test_bytes_are_those_of_storages_and_of_graphs(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each storage once and whole; what is read in place is somebody else's."""
    monkeypatch.setattr(device, "graph_bytes", lambda self: 1000)
    small, large = torch.zeros(5), torch.zeros(1 << 19)
    found = Captured(device(torch.device("cpu")), Operands([small, large], addresses([small, large]), frozenset()))
    assert found.operands.fixed == [1]
    both = torch.zeros(2, 3)
    found.state = torch_state(both[0], both[1], {"y": torch.zeros(7)})  # type: ignore[attr-defined]
    found.own = (torch.zeros(2), None)  # type: ignore[attr-defined]
    assert found.bytes() == 1000 + 4 * (5 + 6 + 7 + 2)


def torch_state(a: Tensor, b: Tensor, scratch: dict[str, Tensor]) -> Any:
    return dataclasses.make_dataclass("State", ["a", "b", "scratch"])(a, b, scratch)


def test_nothing_is_asked_of_the_device_in_a_capture(device: type[RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """A region may die at any time, in the middle of somebody's capture too, where a question to an event is an error."""
    log: list[str] = []
    look_up("a", [], None)
    look_up("a", [], lambda *_: Solve(log))
    monkeypatch.setattr(device, "captured_by_others", True)
    captures._orphan("a")
    assert log == []
    monkeypatch.setattr(device, "captured_by_others", False)
    captures._orphan("b")
    assert log == ["query"]
    assert not captures._found


def test_an_operand_elsewhere_is_declined_at_once(device: type[RehearsalDevice]) -> None:
    for operand in (torch.zeros((), device="meta"), torch.zeros(4, 4, device="meta")):
        for _ in range(2):
            found = look_up("a", [torch.zeros(1), operand], lambda *_: pytest.fail("captured"))
            assert isinstance(found, Declined)
            assert found.solve(1, 2, leaves=True) is None
            assert f"{list(operand.shape)} is on meta" in found.reason
    assert captures.used()[0] == ["loop"]


def test_an_event_that_fails_frees_the_solve(device: type[RehearsalDevice]) -> None:
    found = Solve([])
    found.launched.record = lambda: (_ for _ in ()).throw(RuntimeError("lost"))
    assert found.enter([])
    with pytest.raises(RuntimeError, match="lost"):
        found.leave()
    assert not found.busy.locked()


def test_what_a_body_saved_of_an_operand_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of any strides and dtypes come back from another tensor that lies at the same address, and none is kept."""
    monkeypatch.setattr("deq_compile.region.graphs.operands.SMALL_BYTES", 16)
    base = torch.randn(6, 8)
    held = base[1:]  # an operand that does not begin where its memory does
    own, small = torch.randn(3), torch.randn(2)
    operands = Operands([held, small], addresses([held, small]), frozenset())
    saved = [held.t(), own, held[1, ::2], 7, held.view(torch.int32), operands.tensors[1]]
    want = [s.clone() if isinstance(s, Tensor) else s for s in saved]
    borrowed = Borrowed(SimpleNamespace(saved=saved, other=1), operands)
    without = borrowed.without()
    assert [s is None for s in without.saved] == [True, False, True, False, True, False]
    assert without.other == 1
    again = base.detach()[1:]
    for mine, theirs, before in zip(borrowed.of([again, small]).saved, want, saved, strict=True):
        if isinstance(theirs, Tensor):
            assert mine.stride() == before.stride()  # type: ignore[union-attr]
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert borrowed.of([again, small]).saved[3] == 7
