"""Nothing is compiled before it is known what becomes of a loop that no other backend would compile as a whole.

A loop with a test may be given back, once its calls have shown that solving it cannot pay (region/worth.py): then Dynamo traces
its frame again, and what it compiles is all that was needed. One with a sparse matrix may be kept: then its graph is compiled as
the user wrote it. Compiled beforehand, the rewritten graph and its bodies were for nothing in both: on public models that was up
to sixty times the first step through Inductor alone, which leaves such a loop to Python. So the graph runs uncompiled for as long
as that is open. Every other graph is compiled at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .as_written import Written, fixed_sizes
from .capture import sparse
from .compiling import alone
from .inner import CompiledFn
from .region.site import Site
from .region.worth import WEIGHED_AFTER
from .torch_parts import FakeTensor, TracingContext, tracing

log = logging.getLogger("deq_compile.undecided")

# Calls that a graph runs uncompiled at the most. One whose loops are all kept runs at comparisons alone: some thousand calls.
MOST = 16


def undecided(gm: fx.GraphModule, sites: Sequence[Site], written: Written) -> bool:
    """Whether a rewritten graph may yet be given up for what the user wrote, and nobody else would have compiled its loops. On a
    CPU, with inputs of fixed sizes: nothing that is compiled later on may add a guard."""
    if not any(site.compares for site in sites) or not fixed_sizes(gm.graph) or TracingContext.try_get() is None:
        return False
    values = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    if not all(isinstance(v, FakeTensor) and v.device.type == "cpu" for v in values):
        return False
    outs = [site.way_out for site in sites if site.way_out is not None and site.way_out.leave is not None]
    if outs:
        return not any(out.settled for out in outs)
    return sparse.taken() and written.usable(sites) and not _has_floats(written.graph)


def compiled_when_decided(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    sites: Sequence[Site],
    written: Written,
    compile_graph: Callable[..., CompiledFn],
) -> CompiledFn:
    """A rewritten graph that runs as it is until it is known that its loops are not given up, and is compiled then.

    Args:
        gm: the rewritten graph.
        example_inputs: Dynamo's, of the trace at work.
        sites: its regions.
        written: what it was before.
        compile_graph: (graph module, fake inputs) -> what the inner backend makes of them.
    """
    later = _Later(gm, example_inputs, sites, written, compile_graph)
    return lambda *args: later.found(*args) if later.found is not None else later.call(args)


class _Later:
    """found: what was compiled, None before. asked: whether Dynamo is to trace the frame again, by `retrace` where that has
    anything in it, and to have the graph compiled at once."""

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        sites: Sequence[Site],
        written: Written,
        compile_graph: Callable[..., CompiledFn],
    ) -> None:
        self.gm, self.inputs, self.sites, self.compile_graph = gm, list(example_inputs), sites, compile_graph
        self.context = TracingContext.try_get()
        self.may_be_written, self.floats = written.usable(sites), _has_floats(written.graph)
        self.outs = [site.way_out for site in sites if site.way_out is not None]
        self.retrace = [out.settle for out in self.outs if out.settle is not None]
        self.lock, self.calls = threading.Lock(), 0
        self.found: CompiledFn | None = None
        self.asked = False
        for site in sites:
            site.uncompiled = True

    def call(self, args: Sequence[Any]) -> Any:
        """A call before anything is compiled, or the one that compiles."""
        self.calls += 1
        with self.lock:
            if self.found is None and not self.open():
                self.compile()
        return self.gm.forward(*args) if self.found is None else self.found(*args)

    def open(self) -> bool:
        """Whether something else than the rewritten graph may run yet."""
        if self.calls == 1 or self.asked:
            return True
        if self.calls > MOST:
            return False
        if any(out.left for out in self.outs):
            return True
        kept = [site.verdict == "kept" for site in self.sites]
        if self.may_be_written and all(kept):
            return True
        return bool(self.retrace) and not all(kept) and self.calls <= WEIGHED_AFTER + 1

    def compile(self) -> None:
        if not (self.floats and self.retrace):  # whether Dynamo has to take floats for constants the inner backend has to tell it
            try:
                with alone, tracing(self.context):
                    self.found = self.compile_graph(self.gm, self.inputs)
            except Exception as error:
                if not self.retrace:
                    raise
                log.info("%s is raised again where Dynamo expects it", type(error).__name__)
        if self.found is None:
            self.asked = True
            for settle in self.retrace:
                settle()
        for site in self.sites:
            site.uncompiled = self.found is None
        self.inputs, self.context = [], None


def _has_floats(graph: fx.Graph) -> bool:
    """Whether numbers of Python's that may change from call to call are inputs of a graph as Dynamo gave it."""
    given = (node.meta.get("grapharg") for node in graph.nodes if node.op == "placeholder")
    return any(getattr(argument, "pass_arg_as_tensor", False) for argument in given)
