"""What every pass shares: the graph it works on, the place for its findings, timing, logging, and small graph helpers."""

from __future__ import annotations

import abc
import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from deq_compile.report import Location, Report, Skipped

log = logging.getLogger("deq_compile.passes")

_TORCH = os.path.dirname(torch.__file__)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)')


@dataclasses.dataclass
class Loop:
    """A chain of `count` equal segments of `period` nodes in a graph.

    nodes       all nodes of the chain, in graph order
    carried     offsets in a segment of the values that the next segment reads: the state
    initial     the nodes that the first segment reads in their place
    invariants  nodes from before the chain that every segment reads
    """

    nodes: list[fx.Node]
    period: int
    count: int
    carried: tuple[int, ...]
    initial: tuple[fx.Node, ...]
    invariants: tuple[fx.Node, ...]
    # filled in by later passes
    body: fx.GraphModule | None = None
    hoisted_offsets: tuple[int, ...] = ()
    kept_nodes: tuple[fx.Node, ...] = ()
    operands: tuple[fx.Node, ...] = ()
    sizes: tuple[fx.Node, ...] = ()

    def segment(self, index: int) -> list[fx.Node]:
        index %= self.count
        return self.nodes[index * self.period : (index + 1) * self.period]

    @property
    def outputs(self) -> list[fx.Node]:
        """The state after the last segment."""
        last = self.segment(-1)
        return [last[offset] for offset in self.carried]

    @property
    def location(self) -> Location:
        return common_location(self.segment(0))


@dataclasses.dataclass
class PassContext:
    """What passes hand on to each other while one graph is compiled."""

    min_repeats: Callable[[Sequence[fx.Node]], int]
    report: Report = dataclasses.field(default_factory=Report)
    loops: list[Loop] = dataclasses.field(default_factory=list)

    def skip(self, skipped: Skipped) -> None:
        if skipped not in self.report.skipped:
            self.report.skipped.append(skipped)
            log.info("left alone: %s", skipped)


class Pass(abc.ABC):
    """One job on one graph. `run` returns how many places it changed or found."""

    name: ClassVar[str]

    @abc.abstractmethod
    def run(self, graph: fx.Graph, context: PassContext) -> int: ...

    def __call__(self, graph: fx.Graph, context: PassContext) -> int:
        start = time.perf_counter()
        count = self.run(graph, context)
        elapsed = time.perf_counter() - start
        context.report.seconds[self.name] = context.report.seconds.get(self.name, 0.0) + elapsed
        log.debug("%s: %d in %.1f ms, graph now %d nodes", self.name, count, elapsed * 1e3, len(graph.nodes))
        return count


def value_of(node: fx.Node) -> Any:
    """The fake value Dynamo computed for a node (a FakeTensor, a SymInt, ...), or None."""
    return node.meta.get("example_value")


def hint(size: int | torch.SymInt) -> int:
    """A size as a number: that of this call where it is symbolic, 2 where it depends on data."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return 2 if known is None else int(known)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def describe(node: fx.Node) -> str:
    """The operation of a node as a user would name it."""
    target = node.target
    if node.op == "call_method":
        return f"Tensor.{target}"
    return getattr(target, "__name__", str(target))


def frames(node: fx.Node) -> list[Location]:
    """The user's frames that led to a node, outermost first."""
    return [Location(f, int(n), fn.strip()) for f, n, fn in _FRAME.findall(node.meta.get("stack_trace") or "")]


def location_of(node: fx.Node) -> Location:
    """The user's line that a node comes from: the innermost one outside of torch."""
    found = frames(node)
    own = [place for place in found if not place.file.startswith(_TORCH)]
    return (own or found or [Location()])[-1]


def common_location(nodes: Sequence[fx.Node]) -> Location:
    """The deepest frame that all nodes share, at the first of their lines in it: where the loop stands."""
    stacks = [[place for place in frames(node) if not place.file.startswith(_TORCH)] for node in nodes]
    stacks = [stack for stack in stacks if stack]
    if not stacks:
        return Location()
    depth = 0
    while all(len(s) > depth for s in stacks) and len({(s[depth].file, s[depth].function) for s in stacks}) == 1:
        # below a call site that differs, equal function names are a coincidence
        depth += 1
        if len({s[depth - 1].line for s in stacks}) > 1:
            break
    if depth == 0:
        return stacks[0][-1]
    return min((s[depth - 1] for s in stacks), key=lambda place: place.line)
