"""How a CUDA graph with a WHILE node is assembled, on which device, and that nothing of it is left: calls of the runtime."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deq_compile.region.graphs import conditional
from deq_compile.region.graphs.device import Device, Refused


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


class Runtime:
    """The calls of cuda.bindings.runtime that a WHILE graph takes, logged."""

    def __init__(self, kinds: list[str] | None = None, fails: str = "") -> None:
        self.log: list[str] = []
        self.kinds, self.fails = kinds or ["Kernel", "Memcpy", "Memset", "Kernel"], fails
        self.cudaGraphNodeType = SimpleNamespace(cudaGraphNodeTypeConditional="conditional")
        self.cudaGraphConditionalNodeType = SimpleNamespace(cudaGraphCondTypeWhile="while")
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="this thread")

    def _code(self, call: str) -> int:
        return 900 if call == self.fails else 0

    def cudaGraphCreate(self, flags: int) -> Any:
        return 0, "outer"

    def cudaGraphConditionalHandleCreate(self, graph: Any, default: int, flags: int) -> Any:
        return self._code("handle"), 7

    def cudaGraphNodeParams(self) -> Any:
        return SimpleNamespace(type=None, conditional=SimpleNamespace(phGraph_out=["body"]))

    def cudaGraph_t(self, raw: Any) -> Any:
        return raw

    def cudaGraphGetNodes(self, graph: Any, count: int) -> Any:
        return 0, self.kinds[:count], len(self.kinds)

    def cudaGraphNodeGetType(self, node: str) -> Any:
        return 0, SimpleNamespace(name=f"cudaGraphNodeType{node}")

    def cudaGraphAddChildGraphNode(self, graph: Any, after: Any, count: int, part: Any) -> Any:
        self.log.append(f"{part} into {graph} after {after}")
        return 0, f"node of {part}"

    def cudaGraphAddNode(self, graph: Any, after: Any, data: Any, count: int, params: Any) -> Any:
        self.log.append(f"{params.conditional.type} {params.conditional.handle} into {graph} after {after}")
        return 0, "loop"

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        self.log.append(f"instantiate {graph}")
        return self._code("instantiate"), "executable"

    def cudaStreamBeginCaptureToGraph(self, stream: Any, graph: Any, after: Any, data: Any, count: int, mode: Any) -> Any:
        self.log.append(f"capture {stream} into {graph} after {after} in {mode}")
        return (self._code("capture"),)

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        self.log.append(f"end {stream}")
        return 0, "body"

    def cudaStream_t(self, raw: Any) -> Any:
        return raw

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> Any:
        self.log.append(f"launch {executable} on {stream}")
        return (self._code("launch"),)

    def cudaGraphExecDestroy(self, executable: Any) -> Any:
        self.log.append(f"destroy {executable}")
        return (0,)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        self.log.append(f"destroy {graph}")
        return (0,)

    def cudaGetLastError(self) -> None: ...


class OnCpu:
    """As much of a Device as an assembly asks for."""

    device = torch.device("cpu")
    side = SimpleNamespace(cuda_stream="side")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        log = conditional.runtime().log
        log.append("aside")
        try:
            yield
        finally:
            log.append("back")


CPU = OnCpu()


def part(name: str) -> Any:
    return SimpleNamespace(raw_cuda_graph=lambda: name)


def test_a_while_graph_is_assembled_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Runtime()
    monkeypatch.setattr(conditional, "runtime", lambda: fake)
    graph = conditional.WhileGraph(CPU, conditional.Condition(CPU.device), part("before"), part("trip"), part("after"))
    assert fake.log == [
        "before into outer after None",
        "while 7 into outer after ['node of before']",
        "trip into body after None",
        "after into outer after ['loop']",
        "instantiate outer",
    ]
    fake.log.clear()
    del graph
    gc.collect()
    assert fake.log == ["destroy executable", "destroy outer"]


def test_a_flag_is_looked_at_by_a_node_of_the_loops_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the iteration, captured right into the body; loaded before that, since a capture may load nothing."""
    fake = Runtime()
    monkeypatch.setattr(conditional, "runtime", lambda: fake)

    def enqueue(condition: Any, *, load_only: bool = False) -> None:
        assert condition.flag.dtype == torch.int32
        fake.log.append("load" if load_only else "launch")

    monkeypatch.setattr(conditional, "set_from_flag", enqueue)
    condition = conditional.Condition(CPU.device)
    conditional.WhileGraph(CPU, condition, None, part("trip"), part("after"), flagged=True)
    assert fake.log[:8] == [
        "while 7 into outer after None",
        "trip into body after None",
        "load",
        "aside",
        "capture side into body after ['node of trip'] in this thread",
        "launch",
        "end side",
        "back",
    ]


def test_a_capture_into_the_body_is_ended_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Runtime()
    monkeypatch.setattr(conditional, "runtime", lambda: fake)

    def enqueue(condition: Any, *, load_only: bool = False) -> None:
        if not load_only:
            raise RuntimeError("no such launch")

    monkeypatch.setattr(conditional, "set_from_flag", enqueue)
    with pytest.raises(RuntimeError, match="no such launch"):
        conditional.WhileGraph(CPU, conditional.Condition(CPU.device), None, part("trip"), part("after"), flagged=True)
    assert fake.log[-4:] == ["capture side into body after ['node of trip'] in this thread", "end side", "back", "destroy outer"]


@pytest.mark.parametrize("fails", ["handle", "instantiate", "capture"])
def test_building_that_fails_leaves_no_graph(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Runtime(fails=fails)
    monkeypatch.setattr(conditional, "runtime", lambda: fake)
    monkeypatch.setattr(conditional, "set_from_flag", lambda condition, load_only=False: None)
    with pytest.raises(Refused, match="CUDA said 900"):
        conditional.WhileGraph(CPU, conditional.Condition(CPU.device), None, part("trip"), part("after"), flagged=True)
    gc.collect()
    assert [line for line in fake.log if line.startswith("destroy")] == ["destroy outer"]


def test_graphs_live_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made and launched under it, whichever is current: the CUDA runtime does not look at tensors."""
    fake = Runtime()

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            fake.log.append(f"on {self.device}")

        def __exit__(self, *_: object) -> None:
            fake.log.append("off")

    monkeypatch.setattr(conditional, "runtime", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=f"stream of {device}"))
    monkeypatch.setattr(conditional.Condition, "__init__", lambda self, device: (fake.log.append("condition"), None)[1])  # type: ignore[func-returns-value]
    device = Device.__new__(Device)
    device.device = torch.device("cuda", 1)
    device.new_condition()
    assert fake.log == ["on cuda:1", "condition", "off"]
    fake.log.clear()
    condition = SimpleNamespace(graph="outer", raw=7)
    graph = device.while_graph({"condition": condition, "before": None, "trip": part("trip"), "after": part("after")})
    assert (fake.log[0], fake.log[-2:]) == ("on cuda:1", ["instantiate outer", "off"])
    fake.log.clear()
    graph.replay()
    assert fake.log == ["on cuda:1", "launch executable on stream of cuda:1", "off"]
    assert isinstance(Device.current(torch.device("cuda", 1)), Current)
    assert not isinstance(Device.current(torch.device("cpu")), Current)
    fake.fails = "launch"
    with pytest.raises(RuntimeError, match="CUDA said 900 to the launch"):
        graph.replay()


def test_a_body_with_other_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "runtime", lambda: Runtime(["Kernel", "Host", "MemAlloc", "WaitEvent"]))
    with pytest.raises(Refused, match="nodes of type Host, MemAlloc, WaitEvent"):
        conditional.WhileGraph(
            CPU, SimpleNamespace(graph="g", raw=1), None, part("trip"), part("after")  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(Refused, match="CUDA said 999"):
        conditional.checked((999, None))


def test_a_machine_without_the_bindings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    conditional.runtime.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(Refused, match="cuda-bindings is not installed"):
        conditional.runtime()
    conditional.runtime.cache_clear()
