"""What every pass shares: the graph it works on, the place for its findings, timing, logging, and small graph helpers."""

from __future__ import annotations

import abc
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from deq_compile.markers import NOT_THE_USERS, counted, is_passage, told
from deq_compile.report import Location, Report, Skipped
from deq_compile.torch_parts import FakeTensor, is_functorch_wrapped, is_wrapper_subclass

from .ambient import AUTOCAST_TARGETS

log = logging.getLogger("deq_compile.passes")

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
    form: str = "loop"
    hints: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    lead: int = 0  # tested iterations that the graph makes before it; below 0, untested ones that it has taken in
    stale: tuple[fx.Node, ...] = ()  # results of those, which nobody reads any more
    # filled in by later passes
    tests: tuple[ExitTest, ...] = ()
    test_offsets: frozenset[int] = frozenset()
    counter: fx.Node | None = None  # the count of all iterations, where that is an input
    outside: int = 0  # of those, the ones that the graph makes before or after it
    body: fx.GraphModule | None = None
    hoisted_offsets: tuple[int, ...] = ()
    kept_nodes: tuple[fx.Node, ...] = ()
    operands: tuple[fx.Node, ...] = ()
    sizes: tuple[fx.Node, ...] = ()

    def segment(self, index: int) -> list[fx.Node]:
        index %= self.count
        return self.nodes[index * self.period : (index + 1) * self.period]

    @property
    def declared(self) -> bool:
        """Whether the user's code says that a fixed point is meant, so that no count of iterations is part of its meaning."""
        return bool(self.tests)

    @property
    def kind(self) -> str:
        return f"{self.form} until a test" if self.tests else f"{self.form} of {'n' if self.counter else self.count}"

    @property
    def passages(self) -> set[tuple[Any, ...]]:
        """(site, entry) of the exits of this loop that capture passed by."""
        return {node.args[1:3] for node in self.segment(-1) if is_passage(node.target)}

    @property
    def first(self) -> fx.Node:
        """A node at which the modes hold that the body was written under."""
        return self.segment(0)[0]

    @property
    def reads(self) -> list[fx.Node]:
        """The nodes in whose place the last segment reads the state."""
        previous = self.segment(-2)
        return [previous[offset] for offset in self.carried]

    @property
    def outputs(self) -> list[fx.Node]:
        """The state after the last segment."""
        last = self.segment(-1)
        return [last[offset] for offset in self.carried]

    @property
    def uses(self) -> list[list[fx.Node]]:
        """For each state, the nodes by which what follows knows it."""
        return [[node] for node in self.outputs]

    @property
    def anchor(self) -> fx.Node:
        """Where the node that stands in for the loop goes: after this node's predecessors."""
        return self.segment(1)[0]

    @property
    def about(self) -> list[fx.Node]:
        """Nodes by which what follows knows the numbers about the solve."""
        return []

    @property
    def told(self) -> list[fx.Node]:
        """Nodes that stand for the numbers about the solve of a loop, the largest of all samples."""
        passages = self.passages
        return [node for node in self.first.graph.nodes if node.target is told and node.args[:2] in passages]

    @property
    def erased(self) -> list[fx.Node]:
        """What goes, in graph order."""
        keep = set(self.kept_nodes)
        if keep:  # hoisted work may have to run under the autocast of its segment
            keep.update(node for node in self.segment(0) if node.target in AUTOCAST_TARGETS)
        return [node for node in self.nodes if node not in keep]

    @property
    def location(self) -> Location:
        return common_location([node for node in self.segment(0) if node.target is not counted])


@dataclasses.dataclass
class ExitTest:
    """One test that ends a loop, as a graph of its own.

    graph      test(*z, *f(z), *others) -> a bool, of the state and its image
    when       the loop ends when the test's value is this
    reads      the nodes of the outer graph that stand for the others, tensors and sizes
    positions  of those in the operands and sizes of the loop (filled in by Extract)
    """

    graph: fx.GraphModule
    when: bool
    reads: tuple[fx.Node, ...]
    positions: tuple[int, ...] = ()


@dataclasses.dataclass
class PassContext:
    """What passes hand on to each other while one graph is compiled."""

    min_repeats: Callable[[Sequence[fx.Node]], int]
    keep_hooks: Callable[[Sequence[fx.Node]], bool] = lambda nodes: False
    report: Report = dataclasses.field(default_factory=Report)
    loops: list[Loop] = dataclasses.field(default_factory=list)
    function: str = ""  # the torch.autograd.Function of the user's whose forward runs the graph

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


def marked(node: fx.Node) -> str:
    """The site of a marker node."""
    names = {
        "enter": 1,
        "leave": 2,
        "adjoint_hook": 3,
        "adjoint_input": 1,
        "untold": 2,
        "told": 0,
        "may_exit": 1,
        "counted": 1,
        "after_none": 1,
    }
    return str(node.args[names[node.target.__name__]])  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """In place of a value that passes cannot look into: a tensor of torch.func's, which has no storage, a subclass that wraps
    other tensors, or a layout without strides. No isinstance takes it for a tensor; a loop that touches it is left alone."""

    what: str


def value_of(node: fx.Node) -> Any:
    """The fake value Dynamo computed for a node (a FakeTensor, a SymInt, ...), a `Foreign`, or None."""
    value: Any = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        return _foreign(value) or value
    if type(value) in (tuple, list) and any(isinstance(v, torch.Tensor) and _foreign(v) for v in value):
        return type(value)((isinstance(v, torch.Tensor) and _foreign(v)) or v for v in value)
    return value


def _foreign(value: torch.Tensor) -> Foreign | None:
    if value.layout is not torch.strided:
        return Foreign(str(value.layout))
    if type(value) is FakeTensor:
        return None
    if is_functorch_wrapped(value):
        return Foreign("inside of torch.func")
    return Foreign(type(value).__name__) if is_wrapper_subclass(value) else None


def foreign_among(nodes: Iterable[fx.Node]) -> tuple[fx.Node, str] | None:
    """The first node whose value, or that of an argument, is no plain tensor, or that stands inside of a torch.func transform;
    and what it is."""
    for node in nodes:
        for n in (node, *node.all_input_nodes):
            value = value_of(n)
            for v in value if isinstance(value, tuple | list) else (value,):
                if isinstance(v, Foreign):
                    return node, v.what
        if _TRANSFORM.match(target_of(node)):
            return node, "a torch.func transform"
    return None


def inside_transforms(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that run while a torch.func transform is open: an operator of ours cannot stand there."""
    found, depth = set(), 0
    for node in graph.nodes:
        match = _TRANSFORM.match(target_of(node))
        if match is not None:
            depth += 1 if match[1] == "increment" else -1
        if depth > 0:
            found.add(node)
    return found


def target_of(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "")


# Dynamo writes each transform out as a pair of these.
_TRANSFORM = re.compile(r"_(?:vmap|grad|jvp|func)_(increment|decrement)_nesting$")


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
    own = [place for place in found if not place.file.startswith(NOT_THE_USERS)]
    return (own or found or [Location()])[-1]


def common_location(nodes: Sequence[fx.Node]) -> Location:
    """The deepest frame that all nodes share, at the first of their lines in it: where the loop stands."""
    stacks = [[place for place in frames(node) if not place.file.startswith(NOT_THE_USERS)] for node in nodes]
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
