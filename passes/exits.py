"""Make the tests that end a loop graphs of their own, and refuse what is no test of convergence.

Capture passed each exit of the loop by, with a `may_exit` marker on the value that was tested. A solve may stand in for
the loop only if that value asks how far an iterate is from its image: it must end the loop where the two are equal, and
must not where they are far apart. That is tried out here, on random numbers in float64, for the test as a function of
the iterate z and its image f(z). `while x.norm() > 2: x = x / 2` is thereby told from a loop that seeks a fixed point.

A damped iteration tests its undamped step: with z_new = z + a (v - z) or z_new = z + a v, a constant, v is taken back from
z_new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deq_compile.markers import GUARD, HIDDEN, LEAST, after_none, counted, is_passage, may_exit
from deq_compile.report import Reason, Skipped
from deq_compile.torch_parts import assert_scalar, free_unbacked_symbols, is_erased

from .base import ExitTest, Loop, Pass, PassContext, describe, hint, location_of, value_of
from .functionalise import written_argument

MEMORY = 40  # steps stored, however many iterations the user's loop may make: a plain iteration needs more than Broyden
_FAR = 10.0  # a distance, in units of the iterate's own size
_OPERAND = 1e-3  # stands for a tolerance that is a tensor, whose value is not known at compile time


class Exits(Pass):
    name = "exits"

    def __init__(self, owner: fx.GraphModule) -> None:
        self.owner = owner

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        accepted = []
        for loop in context.loops:
            markers = [node for node in loop.segment(-1) if node.target is may_exit]
            loop.test_offsets = _only_tested(loop) if loop.passages else frozenset()
            tests = [self._test(loop, node) for node in markers]
            refused = next((test for test in tests if isinstance(test, Skipped)), None)
            loop.tests = tuple(test for test in tests if isinstance(test, ExitTest))
            if refused is None:
                refused = _count_comes_in(graph, loop) or _computed_with(loop)
            if refused is None and markers and not loop.tests:  # nothing but guards against NaN
                refused = Skipped(Reason.EXIT_TEST, location_of(markers[0]), "", loop.count)
            if refused is not None:
                context.skip(refused)
                continue
            if markers and str(markers[0].args[1]).startswith("while_loop:"):
                loop.form = "while_loop"
            caps = {int(node.args[4]) for node in markers} - {0}  # type: ignore[arg-type]
            if HIDDEN in caps:
                context.skip(Skipped(Reason.HIDDEN_CAP, location_of(markers[0]), "", loop.count))
                continue
            if caps:
                outside, loop.lead = _outside(graph, loop, markers[0])
                cap = max(1, min(caps) - outside)
                loop.hints |= {"max_iter": cap, "memory": min(cap, MEMORY)}
            accepted.append(loop)
        context.loops = accepted
        return sum(len(loop.tests) for loop in accepted)

    def _test(self, loop: Loop, marker: fx.Node) -> ExitTest | Skipped | None:
        """None where the test never ends the loop at finite values: a guard against NaN, of which the solver has its own."""
        predicate, when = marker.args[0], bool(marker.args[3])
        assert isinstance(predicate, fx.Node)
        outcomes = []
        for made in (self._plain(loop, predicate), self._undamped(loop, predicate)):
            if made is None:
                continue
            graph, reads = made
            verdict = _probe(graph, loop, reads, when)
            if verdict == "test":
                return ExitTest(graph, when, reads)
            if verdict == "guard":
                return None
            outcomes.append(verdict)
        place = location_of(marker)
        detail = f"{describe(predicate)}: {'; '.join(dict.fromkeys(outcomes)) or 'it reads more than the state'}"
        return Skipped(Reason.EXIT_TEST, place if place.file else loop.location, detail, loop.count)

    def _plain(self, loop: Loop, predicate: fx.Node) -> tuple[fx.GraphModule, tuple[fx.Node, ...]] | None:
        """The test as a function of z and f(z)."""
        return _Builder(loop).finish(self.owner, predicate)

    def _undamped(self, loop: Loop, predicate: fx.Node) -> tuple[fx.GraphModule, tuple[fx.Node, ...]] | None:
        """The test where it reads an intermediate v of the body, with z_new = z + a (v - z) or z + a v."""
        if len(loop.outputs) != 1:
            return None
        (result,), (read,) = loop.outputs, loop.reads
        segment = loop.segment(-1)
        upstream = _ancestors(predicate, segment)
        for v in reversed(segment):
            if v is result or v not in upstream or not _alike(v, result):
                continue
            mixing = _Builder(loop, images=[v])
            made = mixing.finish(self.owner, result)
            found = _damping(made[0], v) if made is not None and not made[1] else None
            if found is None:
                continue
            damping, is_step = found
            builder = _Builder(loop)
            z, new = builder.env[read], builder.env[result]
            step = builder.graph.call_function(torch.sub, (new, z))
            if is_step:
                builder.env[v] = builder.graph.call_function(torch.mul, (step, 1.0 / damping))
            else:
                builder.env[v] = builder.graph.call_function(torch.add, (z, step), {"alpha": 1.0 / damping})
            return builder.finish(self.owner, predicate)
        return None


def _count_comes_in(graph: fx.Graph, loop: Loop) -> Skipped | None:
    """Take note of the count of a loop where that is an input; why it may not be, where too many iterations lie outside."""
    found = [node for node in loop.segment(-1) if node.target is counted]
    if not found:
        return None
    marker, counter = found[0], found[0].args[0]
    assert isinstance(counter, fx.Node)
    traced = sum(node.target is counted and node.args[1:3] == marker.args[1:3] for node in graph.nodes)
    loop.counter, loop.outside = counter, traced - loop.count
    unknown = bool(free_unbacked_symbols(value_of(counter)))  # it may be less
    if loop.tests or not marker.args[3] or loop.outside >= (1 if unknown else LEAST):
        return Skipped(Reason.COUNTER, location_of(marker), "its count is an input, and some iterations are others", loop.count)
    begins = dict(zip(loop.outputs, loop.initial, strict=True))
    for node in graph.nodes:
        if node.target is after_none and node.args[1:3] == marker.args[1:3]:
            for after, before in zip(node.args[3], node.args[4], strict=True):
                if begins.get(after, after) is not before:
                    return Skipped(
                        Reason.COUNTER, location_of(marker), "it may make no iteration, and begins elsewhere", loop.count
                    )
    return None


def _computed_with(loop: Loop) -> Skipped | None:
    """What the count of a loop goes into, where that is more than numbers about the loop: the model's own results. The same of
    numbers in a list that holds the last of them only."""
    order = {node: i for i, node in enumerate(loop.first.graph.nodes)}
    after = {kept: order[node] for node in loop.told for kept in node.all_input_nodes}
    seen, stack = set(loop.told), [*loop.told, *after]
    while stack:
        node = stack.pop()
        for user in node.users:
            if order[user] <= after.get(node, -1):
                continue
            value = value_of(user)
            if isinstance(value, Tensor) and (value.requires_grad or any(s != 1 for s in value.shape)):
                place = location_of(user)
                detail = f"{describe(user)} computes with it"
                return Skipped(Reason.COUNTER, place if place.file else loop.location, detail, loop.count)
            if user not in seen and user.op != "output":
                seen.add(user)
                stack.append(user)
    return None


class _Builder:
    """A graph of one value in the last segment, as a function of the state, its image, and what lies before the loop."""

    def __init__(self, loop: Loop, images: Sequence[fx.Node] | None = None) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.segment = set(loop.segment(-1))
        self.chain = set(loop.nodes)
        self.reads: dict[fx.Node, None] = {}
        for prefix, nodes in (("z", loop.reads), ("f", images or loop.outputs)):
            for i, node in enumerate(nodes):
                self.env[node] = self.graph.placeholder(f"{prefix}{i}")
        self.last = self.graph.placeholder("end")  # operands go before this one

    def finish(
        self, owner: fx.GraphModule, node: fx.Node, reduced: str = ""
    ) -> tuple[fx.GraphModule, tuple[fx.Node, ...]] | None:
        """`reduced`: the method of a tensor that makes one number of the node's."""
        if not self._copy(node):
            return None
        self.graph.output(self.graph.call_method(reduced, (self.env[node],)) if reduced else self.env[node])
        self.graph.erase_node(self.last)
        return fx.GraphModule(owner, self.graph, class_name="ExitTest"), tuple(self.reads)

    def _copy(self, node: fx.Node) -> bool:
        if node in self.env:
            return True
        if node in self.segment:
            if not all(self._copy(a) for a in node.all_input_nodes):
                return False
            self.env[node] = self.graph.node_copy(node, lambda a: self.env[a])
            return True
        value = value_of(node)
        if node in self.chain or node.op == "get_attr":
            return False  # an earlier iteration's
        if isinstance(value, torch.SymFloat | float) and node.op != "placeholder":  # a number from before the loop
            if not all(self._copy(a) for a in node.all_input_nodes):
                return False
            with self.graph.inserting_before(self.last):
                self.env[node] = self.graph.node_copy(node, lambda a: self.env[a])
            return True
        if not isinstance(value, Tensor | torch.SymInt | int):
            return False
        self.reads[node] = None
        with self.graph.inserting_before(self.last):
            self.env[node] = self.graph.placeholder(f"a{len(self.reads)}")
        return True


def _outside(graph: fx.Graph, loop: Loop, marker: fx.Node) -> tuple[int, int]:
    """Iterations that were traced and are not among the loop's segments: the graph makes them before it, or after it. And how
    many of them come before it."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    first, last = position[loop.nodes[0]], position[loop.nodes[-1]]
    tests = [
        position[node]
        for node in graph.nodes
        if node.target is may_exit and node.args[1:3] == marker.args[1:3] and node.args[4] != GUARD
    ]
    lead = before = sum(at < first for at in tests)
    behind = [at for at in tests if at > last]
    if behind:  # what is computed up to the test alone goes with it
        nodes = list(graph.nodes)[last + 1 : behind[-1]]
        before += any(position[user] > behind[-1] for node in nodes for user in node.users)
    return before, lead


def _only_tested(loop: Loop) -> frozenset[int]:
    """Offsets of what is computed for the tests alone."""
    segment = loop.segment(-1)
    needed: set[fx.Node] = set()
    for node in loop.outputs:
        needed |= _ancestors(node, segment)
    read = {a for node in segment if is_passage(node.target) for a in _ancestors(node, segment)}
    return frozenset(o for o, node in enumerate(segment) if node in read and node not in needed)


def _ancestors(node: fx.Node, segment: Sequence[fx.Node]) -> set[fx.Node]:
    """`node` and what it is computed from, within a segment."""
    inside, found, stack = set(segment), {node}, [node]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a in inside and a not in found:
                found.add(a)
                stack.append(a)
    return found


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = value_of(a), value_of(b)
    return isinstance(x, Tensor) and isinstance(y, Tensor) and str(x.shape) == str(y.shape) and x.dtype == y.dtype


# ---- trying a test out


def _random(like: fx.Node, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    value = value_of(like)
    shape = [hint(s) for s in value.shape]
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(value.device)


def exits_when(
    owner: fx.GraphModule, loop: Loop, node: fx.Node, images: Sequence[fx.Node], same: Mapping[fx.Node, fx.Node], when: bool
) -> bool:
    """Whether all elements of a node of the last segment are `when` where an iterate equals its image, and not where they are
    far apart. `images` are the results of the states, `same` says which nodes are to be taken for others."""
    builder = _Builder(loop, images=images)
    builder.env |= {of: builder.env[to] for of, to in same.items() if to in builder.env}
    made = builder.finish(owner, node, "all" if when else "any")
    return made is not None and _probe(made[0], loop, made[1], when) == "test" and not _by_one(made[0], loop, made[1], when)


def _by_one(graph: fx.GraphModule, loop: Loop, reads: Sequence[fx.Node], when: bool) -> bool:
    """Whether a test of many elements holds although one sample, the first or the last, is far from its image."""
    generator, others = torch.Generator().manual_seed(0), _others(reads)
    z = [_random(node, generator) for node in loop.outputs]
    with torch.no_grad():
        for row in (0, -1):
            f = [t.clone() for t in z]
            for t in f:
                t[row] += _FAR * (1 + t[row].abs())
            if bool(graph(*z, *f, *(others or ()))) is when:
                return True
    return False


def _others(reads: Sequence[fx.Node]) -> list[Any] | None:
    values: list[Any] = []
    for node in reads:
        value = value_of(node)
        if isinstance(value, Tensor):
            if not value.is_floating_point() or math.prod(hint(s) for s in value.shape) != 1:
                return None
            number = next((known for user in node.users if (known := _number(value_of(user))) is not None), _OPERAND)
            values.append(torch.full([hint(s) for s in value.shape], number, dtype=torch.float64, device=value.device))
        else:
            values.append(hint(value))
    return values


def _number(value: Any) -> float | None:
    """What a symbolic float is in this call."""
    known: Any = value.node.hint if isinstance(value, torch.SymFloat) else None
    return None if known is None else float(known)


def _probe(graph: fx.GraphModule, loop: Loop, reads: Sequence[fx.Node], when: bool) -> str:
    """ "test", "guard" (against values that are not finite), or what speaks against it."""
    others = _others(reads)
    if others is None:
        return "it reads a tensor whose value is not known"
    generator = torch.Generator().manual_seed(0)

    def ends(z: list[Tensor], f: list[Tensor]) -> bool:
        return bool(graph(*z, *f, *others)) is when

    try:
        with torch.no_grad():
            z = [_random(node, generator) for node in loop.outputs]
            noise = [_random(node, generator, _FAR) for node in loop.outputs]
            large = [1e3 * t for t in z]
            equal = [ends(z, [t.clone() for t in z]), ends(large, [t.clone() for t in large])]
            far = [ends(z, [a + b for a, b in zip(z, noise, strict=True)]), ends(z, [2 * t for t in z])]
            if all(equal) and not any(far):
                return "test"
            if not any(equal + far) and ends(z, [torch.full_like(t, math.nan) for t in z]):
                return "guard"
    except Exception as error:  # whatever the user's expression raises on other numbers than his own
        return f"{type(error).__name__}: {error}"
    return "it does not hold where an iterate equals its image" if not all(equal) else "it holds far from a fixed point"


def _damping(graph: Callable[..., Tensor], v: fx.Node) -> tuple[float, bool] | None:
    """(a, whether v is the step) of z_new = z + a (v - z), or z + a v, where that is what `graph` computes of z and v."""
    generator = torch.Generator().manual_seed(0)
    for is_step in (False, True):
        found = []
        try:
            with torch.no_grad():
                for _ in range(2):
                    z, step = _random(v, generator), _random(v, generator)
                    change = graph(z, step if is_step else z + step) - z
                    a = float((change * step).sum() / (step * step).sum())
                    if a and torch.allclose(change, a * step, rtol=1e-9, atol=1e-9):  # float64 rounding
                        found.append(a)
        except Exception:  # it does not run on these numbers: no damping then
            return None
        if len(found) == 2 and math.isclose(*found, rel_tol=1e-9):
            return found[0], is_step
    return None


# ---- before and afterwards


def drop_assertions(graph: fx.Graph) -> None:
    """Erase what Dynamo asserts of the numbers that exits were tested by (that a bool is 0 or 1): each has a text of its own."""
    tested: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is may_exit and isinstance(node.args[0], fx.Node):
            tested |= _ancestors(node.args[0], list(graph.nodes))
    for node in reversed(list(graph.nodes)):
        if node.target is assert_scalar:
            sources = [a for a in _ancestors(node, list(graph.nodes)) if a.op == "call_method" and a.target == "item"]
            if sources and all(source in tested for source in sources):
                condition = node.args[0]
                graph.erase_node(node)
                erase_unused(graph, condition)
    if tested:  # numbers that the loop has read, and kept of the last iteration only
        for node in reversed(list(graph.nodes)):
            value = value_of(node)
            single = isinstance(value, Tensor) and value.dim() == 0
            if not node.users and (single or (node.op == "call_method" and node.target == "item")):
                erase_unused(graph, node)


def drop_consumed(graph: fx.Graph, passages: set[tuple[Any, ...]]) -> None:
    """Erase what is left of the tests of loops that were replaced: those before the first and after the last segment."""
    for node in reversed(list(graph.nodes)):
        if is_passage(node.target) and node.args[1:3] in passages:
            graph.erase_node(node)
            erase_unused(graph, node.args[0])


def erase_unused(graph: fx.Graph, node: Any) -> None:
    """Erase a node that nothing reads, and then what only it has read."""
    if not isinstance(node, fx.Node) or is_erased(node) or node.users or node.op in ("placeholder", "get_attr", "output"):
        return
    if written_argument(node) is not None or node.is_impure():
        return
    reads = node.all_input_nodes
    graph.erase_node(node)
    for a in reads:
        erase_unused(graph, a)
