"""Small graphs, captured and run through the passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from deq_compile.passes.base import Loop, PassContext
from deq_compile.passes.extract import Extract
from deq_compile.passes.find_loops import FindLoops, deduplicate_constants
from deq_compile.passes.functionalise import Functionalise
from deq_compile.passes.hoist import Hoist
from deq_compile.passes.judge import Judge
from deq_compile.passes.replace import Replace
from deq_compile.region.modes import Ambient


def stand_in(states: Any, operands: Any, sizes: Any) -> list[Tensor]:
    """What Replace puts in the place of a loop here."""
    raise NotImplementedError


def captured(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    found = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def text(graph: fx.Graph) -> str:
    return str(graph).strip()


def run_passes(gm: fx.GraphModule, until: str = "replace") -> tuple[fx.Graph, PassContext]:
    graph, context = copy.deepcopy(gm.graph), PassContext(lambda nodes: 3)
    deduplicate_constants(graph)
    passes = [Functionalise(), FindLoops(), Judge(Ambient.now()), Hoist(), Extract(gm)]
    passes.append(Replace(lambda loop: (stand_in, (list(loop.initial), list(loop.operands), list(loop.sizes)))))
    for step in passes:
        step(graph, context)
        if step.name == until:
            break
    return graph, context


def one_loop(function: Callable[..., Any], *inputs: Any, until: str = "replace") -> tuple[fx.Graph, Loop]:
    graph, context = run_passes(captured(function, *inputs), until)
    (loop,) = context.loops
    return graph, loop
