"""A graph whose loops are all kept runs as the user wrote it: the inner backend compiles it once more, with the loops in it.

A region that keeps its loop calls the body's compiled code N times, forward and backward. Inductor, which sees all N iterations,
fuses across them and has no call between them: on public models with small bodies that took a third to a half of the time off a
step. So, once the calls of a region are past their first comparisons, the graph as Dynamo gave it takes its place. At the calls
that compare, and while somebody records solves, the rewritten graph runs: a loop that begins to agree with its fixed point is
solved again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .compiling import alone
from .inner import CompiledFn
from .lower import MOST_NODES
from .markers import is_marker
from .region import agree, records
from .region.graphs import capturing
from .region.site import Site
from .region.worth import small
from .torch_parts import FakeTensor, FakeTensorMode, TracingContext, callable_below, tracing
from .unexpected import survive

log = logging.getLogger("deq_compile.as_written")

SETTLED = 3  # calls, of which the first three compare


class Written:
    """A graph as Dynamo gave it, taken before it is rewritten."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.inner = [
            (module, module.graph) for module in gm.modules() if isinstance(module, fx.GraphModule) and module is not gm
        ]

    def usable(self, sites: Sequence[Site]) -> bool:
        """Whether the graph is to stand in for the rewritten one, should all of its loops be kept: they have a fixed count, so
        that their iterations stand in it, and small bodies, and its inputs have fixed sizes."""
        if not all(site.spec.written_out for site in sites) or len(self.graph.nodes) > MOST_NODES:
            return False
        gains = any(site.way_out is not None and small(site.way_out.work, site.spec.grad) for site in sites)
        if not gains or any(module.graph is not graph for module, graph in self.inner):  # the body of a checkpoint was rewritten
            return False
        return fixed_sizes(self.graph) and not any(is_marker(node.target) for node in self.graph.nodes)

    def module(self) -> fx.GraphModule:
        return fx.GraphModule(self.gm, self.graph, class_name="AsWritten")


def fixed_sizes(graph: fx.Graph) -> bool:
    """Whether the inputs of a graph are plain tensors whose sizes do not change."""
    values = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
    return all(isinstance(v, FakeTensor) and all(isinstance(s, int) for s in v.shape) for v in values)


def turning(
    rewritten: CompiledFn, sites: Sequence[Site], written: Written, compile_graph: Callable[..., CompiledFn]
) -> CompiledFn:
    """The compiled graph of some regions; in its place the graph as written, once all of them are kept.

    Args:
        rewritten: what was compiled of the rewritten graph.
        sites: its regions.
        written: what it was before.
        compile_graph: (graph module, fake inputs) -> what the inner backend makes of them.
    """
    if not sites or not written.usable(sites):
        return rewritten
    rewritten = callable_below(rewritten) or rewritten  # Dynamo disables itself around `call`: once is enough
    lock = threading.Lock()
    found: list[CompiledFn | None] = []

    def as_written(args: Sequence[Any]) -> CompiledFn | None:
        with lock:
            if not found:
                with alone:
                    found.append(_compiled(written, args, compile_graph))
        return found[0]

    def call(*args: Any) -> Any:
        if _kept(sites) and (plain := found[0] if found else as_written(args)) is not None:
            for site in sites:
                site.calls += 1
            return plain(*args)
        return rewritten(*args)

    return call


def _kept(sites: Sequence[Site]) -> bool:
    """Whether this call has nothing to find out, and every loop is to run as it is."""
    if sites[0].verdict != "kept" or records.recording() or capturing():  # the first of them first: most loops are solved
        return False
    for site in sites:
        agree.look(site)
        if site.verdict != "kept" or (site.compares and site.calls < SETTLED) or site.due():
            return False
    return True


def _compiled(written: Written, args: Sequence[Any], compile_graph: Callable[..., CompiledFn]) -> CompiledFn | None:
    """What the inner backend makes of a graph as it was written; None where it fails, and the rewritten one goes on."""
    log.info("all loops of a graph are kept: it is compiled as it was written")
    mode = FakeTensorMode()
    try:
        with tracing(TracingContext(mode)):
            return compile_graph(written.module(), [mode.from_tensor(a, static_shapes=True) for a in args])
    except Exception as error:  # whatever an inner backend may raise: the kept loop is right as it is
        survive(error, "compiling a graph with kept loops as it was written")
        return None
