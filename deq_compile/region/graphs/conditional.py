"""A CUDA graph whose middle is a WHILE node, assembled through the CUDA runtime's own calls (cuda-bindings)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .device import Refused, collector_paused

# Assign the default value at each launch: cudaGraphConditionalHandleFlags.cudaGraphCondAssignDefault, 1 in 13.0, 13.1 and 13.5.
_ASSIGN_DEFAULT = 1
# What may stand in the body of a conditional node (CUDA programming guide), and what torch's captures of a body consist of.
_ALLOWED = frozenset({"Kernel", "Memcpy", "Memset", "Empty", "Graph"})


@functools.cache
def runtime() -> Any:
    """The module cuda.bindings.runtime, with all that is called here.

    Raises:
        Refused: it is not installed or too old.
    """
    try:
        from cuda.bindings import runtime as rt
    except ImportError as error:
        raise Refused(f"cuda-bindings is not installed ({error})") from None
    for name in ("cudaGraphConditionalHandleCreate", "cudaGraphAddNode", "cudaGraphAddChildGraphNode"):
        if not hasattr(rt, name):
            raise Refused(f"cuda-bindings has no {name}")
    return rt


def checked(result: tuple[Any, ...]) -> Any:
    """The values a call returned, without its error code."""
    if int(result[0]) != 0:
        runtime().cudaGetLastError()  # or the next call of torch's would report it
        raise Refused(f"CUDA said {result[0]}")
    values = result[1:]
    return values[0] if len(values) == 1 else values


def _ends_with(owner: object, destroy: Callable[[Any], Any], what: Any) -> None:
    """Destroy a graph when its owner goes; not at the end of the process, where the driver may be gone before."""
    weakref.finalize(owner, destroy, what).atexit = False


class Condition:
    """An outer graph, and what decides about its WHILE node.

    handle  (1,) int64 on the device: the handle of the condition as a number, for kernels to read
    flag    (1,) int32 on the device: what the kernels of an iteration write instead, if the loop has a node that looks at it
    """

    def __init__(self, device: torch.device) -> None:
        rt = runtime()
        self.graph = checked(rt.cudaGraphCreate(0))
        _ends_with(self, rt.cudaGraphDestroy, self.graph)
        self.raw = checked(rt.cudaGraphConditionalHandleCreate(self.graph, 1, _ASSIGN_DEFAULT))
        number = int(self.raw)
        signed = number - (1 << 64) if number >= 1 << 63 else number
        self.handle: Tensor = torch.tensor([signed], dtype=torch.int64, device=device)
        self.flag: Tensor = torch.zeros(1, dtype=torch.int32, device=device)


def set_from_flag(condition: Any, *, load_only: bool = False) -> None:
    """Enqueue what sets the condition from the flag, or only compile and load it, which no capture allows."""
    from deq_compile.kernels.triton_shared import set_from

    if not load_only:
        set_from[(1,)](condition.handle, condition.flag, num_warps=1)
    elif (compiled := set_from.warmup(condition.handle, condition.flag, grid=(1,), num_warps=1)) is not None:
        compiled._init_handles()


class WhileGraph:
    """before; while the condition holds: trip; after. `before` may be None. All are graphs captured with keep=True.

    `flagged`: the kernels of `trip` write the condition's flag, and a node behind them sets the condition from it. That node is
    captured right into the body of the loop; `trip` is a child graph of it.

    Raises:
        Refused: a call fails, or a part has nodes that a loop cannot hold.
    """

    def __init__(
        self, device: Any, condition: Condition, before: Any | None, trip: Any, after: Any, flagged: bool = False
    ) -> None:
        rt = runtime()
        self.device = device.device
        self.parts = (condition, before, trip, after)  # they own the memory that the graph works in
        refused = sorted({kind for kind in node_types(trip.raw_cuda_graph()) if kind not in _ALLOWED})
        if refused:
            raise Refused(f"the captured body has nodes of type {', '.join(refused)}, which no WHILE node holds")
        outer = condition.graph
        ahead = [self._child(outer, before, [])] if before is not None else []
        params = rt.cudaGraphNodeParams()
        params.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = condition.raw
        params.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
        params.conditional.size = 1
        try:
            node = checked(rt.cudaGraphAddNode(outer, ahead or None, None, len(ahead), params))
        except TypeError:  # an older signature, without edge data
            node = checked(rt.cudaGraphAddNode(outer, ahead or None, len(ahead), params))
        body = params.conditional.phGraph_out[0]
        last = self._child(body, trip, [])
        if flagged:
            self._decide(device, body, last, condition)
        self._child(outer, after, [node])
        self.executable = checked(rt.cudaGraphInstantiate(outer, 0))
        _ends_with(self, rt.cudaGraphExecDestroy, self.executable)

    @staticmethod
    def _child(graph: Any, part: Any, after: list[Any]) -> Any:
        rt = runtime()
        raw = rt.cudaGraph_t(part.raw_cuda_graph())
        return checked(rt.cudaGraphAddChildGraphNode(graph, after or None, len(after), raw))

    @staticmethod
    def _decide(device: Any, body: Any, after: Any, condition: Condition) -> None:
        """Capture one launch into the body of the loop, behind a node of it."""
        rt = runtime()
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        set_from_flag(condition, load_only=True)
        with device.aside(), collector_paused():
            stream = rt.cudaStream_t(device.side.cuda_stream)
            checked(rt.cudaStreamBeginCaptureToGraph(stream, body, [after], None, 1, mode))
            try:
                set_from_flag(condition)
            finally:
                ended = rt.cudaStreamEndCapture(stream)
            checked(ended)

    def replay(self) -> None:
        """Launch on the caller's stream.

        Raises:
            RuntimeError: CUDA refuses.
        """
        rt = runtime()
        with torch.cuda.device(self.device):
            stream = rt.cudaStream_t(torch.cuda.current_stream(self.device).cuda_stream)
            (code,) = rt.cudaGraphLaunch(self.executable, stream)
        if int(code) != 0:
            rt.cudaGetLastError()
            raise RuntimeError(f"CUDA said {code} to the launch of a captured solve")


def node_types(raw: int) -> list[str]:
    """The types of a graph's nodes, as in cudaGraphNodeType without its prefix."""
    rt = runtime()
    graph = rt.cudaGraph_t(raw)
    _, count = checked(rt.cudaGraphGetNodes(graph, 0))
    nodes, count = checked(rt.cudaGraphGetNodes(graph, count))
    return [checked(rt.cudaGraphNodeGetType(node)).name.removeprefix("cudaGraphNodeType") for node in nodes[:count]]
