"""A CUDA graph whose middle is a WHILE node, assembled through the CUDA runtime's own calls (cuda-bindings)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .device import Refused

# Assign the default value at each launch: cudaGraphCondAssignDefault, which cuda-bindings 13 does not name in its runtime module.
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


class Condition:
    """An outer graph, and the handle of its WHILE node as a number on the device for kernels to read."""

    def __init__(self, device: torch.device) -> None:
        rt = runtime()
        self.graph = checked(rt.cudaGraphCreate(0))
        self.raw = checked(rt.cudaGraphConditionalHandleCreate(self.graph, 1, _ASSIGN_DEFAULT))
        number = int(self.raw)
        signed = number - (1 << 64) if number >= 1 << 63 else number
        self.handle: Tensor = torch.tensor([signed], dtype=torch.int64, device=device)


class WhileGraph:
    """before; while the condition holds: trip; after. `before` may be None. All are graphs captured with keep=True.

    Raises:
        Refused: a call fails, or a part has nodes that a loop cannot hold.
    """

    def __init__(self, device: Any, condition: Condition, before: Any | None, trip: Any, after: Any) -> None:
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
        self._child(params.conditional.phGraph_out[0], trip, [])
        self._child(outer, after, [node])
        self.executable = checked(rt.cudaGraphInstantiate(outer, 0))

    @staticmethod
    def _child(graph: Any, part: Any, after: list[Any]) -> Any:
        rt = runtime()
        raw = rt.cudaGraph_t(part.raw_cuda_graph())
        return checked(rt.cudaGraphAddChildGraphNode(graph, after or None, len(after), raw))

    def replay(self) -> None:
        rt = runtime()
        stream = rt.cudaStream_t(torch.cuda.current_stream(self.device).cuda_stream)
        checked(rt.cudaGraphLaunch(self.executable, stream))

    def __del__(self) -> None:
        executable = getattr(self, "executable", None)
        if executable is not None:
            runtime().cudaGraphExecDestroy(executable)


def node_types(raw: int) -> list[str]:
    """The types of a graph's nodes, as in cudaGraphNodeType without its prefix."""
    rt = runtime()
    graph = rt.cudaGraph_t(raw)
    _, count = checked(rt.cudaGraphGetNodes(graph, 0))
    nodes, count = checked(rt.cudaGraphGetNodes(graph, count))
    return [checked(rt.cudaGraphNodeGetType(node)).name.removeprefix("cudaGraphNodeType") for node in nodes[:count]]


