"""Find chains of equal segments: the unrolled form of a loop that applies one map again and again.

Dynamo unrolls a Python loop of fixed count, so `for _ in range(30): z = f(z, x)` arrives as 30 equal runs of nodes. Three
steps, O(n log n) in the number of nodes n:

1. every node gets a hash of what it does (operation, constants, shapes, *which* parameters and inputs it reads);
   hashes of windows of 1, 2, 4, ... nodes, built by doubling, give candidate periods;
2. for a period p a linear scan keeps the nodes whose arguments are either the very same node or exactly p back;
3. a chain is classified from its **last two** segments (the first may be special: initial guess, dtype): what the last
   reads from the one before is the state, what all read from before the chain are invariants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from deq_compile.markers import UNROLLED, is_passage
from deq_compile.report import Reason, Skipped
from deq_compile.torch_parts import HigherOrderOperator

from .base import (
    Foreign,
    Loop,
    Pass,
    PassContext,
    common_location,
    describe,
    foreign_among,
    hint,
    inside_transforms,
    is_tensor,
    location_of,
    value_of,
)  # fmt: skip
from .hashes import argument_nodes, candidate_periods, constants, meta_key, signature

# A body of two like halves (two sublayers of one shape) shows its half as a period: also try multiples.
_MULTIPLES = (1, 2, 3, 4, 6, 8)
# Of UNROLLED segments one may be peeled at either end, and two lost to the search for the right period.
SEGMENTS_OF_A_CUT_LOOP = 5


class FindLoops(Pass):
    name = "find_loops"

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        chain = Chain(graph)
        taken: list[tuple[int, int]] = []
        refused: list[tuple[int, int, int, Skipped]] = []
        for start, stop, period in chain.runs(2):
            start, stop = clip(start, stop, taken)
            if stop - start < 2 * period:
                continue
            # A run that is no loop may hold one of shorter period: the inner of two nested loops.
            if any(start < b and a < stop and period >= p for a, b, p, _ in refused):
                continue
            found = chain.loop(start, stop, period, context.min_repeats)
            if isinstance(found, Loop):
                context.loops.append(found)
                first = chain.position[found.nodes[0]]
                taken.append((first, first + len(found.nodes)))
            elif found is not None:
                refused.append((start, stop, period, found))
        told: list[tuple[int, int]] = []
        for start, stop, _, skipped in refused:
            if not any(start < b and a < stop for a, b in taken + told):
                context.skip(skipped)
                told.append((start, stop))
        taken += told
        for skipped in chain.near_misses(taken):
            context.skip(skipped)
        context.loops.sort(key=lambda loop: chain.position[loop.nodes[0]])
        return len(context.loops)


class Chain:
    """The call nodes of a graph in order, their hashes, and the search for periodic runs among them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.args = [argument_nodes(n) for n in self.nodes]
        self.strict = [signature(n, identity=True) for n in self.nodes]
        self.loose = [signature(n, identity=False) for n in self.nodes]
        self.operation = [hash((n.op, str(n.target))) for n in self.nodes]
        self.transformed = inside_transforms(graph)
        self.exits = Counter(n.args[1:3] for n in self.nodes if is_passage(n.target))

    # ---- step 1 and 2: periodic runs

    def runs(self, repeats: int) -> list[tuple[int, int, int]]:
        """Maximal [start, stop) with period p and at least `repeats` periods, longest first, short periods first."""
        n, found = len(self.nodes), set()
        periods = {q * m for q in candidate_periods(self.strict) for m in _MULTIPLES if q * m * repeats <= n}
        for p in sorted(periods):
            i = 0
            while i + p < n:
                if not self._same(i, p):
                    i += 1
                    continue
                start = i
                while i + p < n and self._same(i, p):
                    i += 1
                stop = i + p
                start = self._extend_left(start, p)
                if stop - start >= repeats * p:
                    found.add((start, stop, p))
        return sorted(found, key=lambda run: (run[0] - run[1], run[2]))

    def _same(self, i: int, p: int) -> bool:
        """Node i + p does what node i does, on the same nodes or on those one period later."""
        if self.strict[i] != self.strict[i + p]:
            return False
        earlier, later = self.args[i], self.args[i + p]
        return len(earlier) == len(later) and all(
            a is b or (a in self.position and b in self.position and self.position[b] - self.position[a] == p)
            for a, b in zip(earlier, later, strict=True)
        )

    def _extend_left(self, start: int, p: int) -> int:
        """Take in up to one period more: the first segment, which reads the initial state where later ones read z."""
        low = start
        while low > 0 and start - (low - 1) <= p and self.loose[low - 1] == self.loose[low - 1 + p]:
            i = low - 1
            for a, b in zip(self.args[i], self.args[i + p], strict=False):
                shifted = a in self.position and b in self.position and self.position[b] - self.position[a] == p
                enters = b in self.position and (a not in self.position or self.position[a] < i)
                if not (a is b or shifted or enters):
                    return low
            low = i
        return low

    # ---- step 3: from a run to a loop

    def loop(self, start: int, stop: int, period: int, min_repeats: Any) -> Loop | Skipped | None:
        """The loop in a periodic run; a `Skipped` where it looks like one and is none; None where nothing is carried."""
        why: Skipped | None = None
        for _ in range(4):
            built = self._build(start, stop, period)
            if built is None or isinstance(built, Skipped):
                return why or built
            first = self.position[built.nodes[0]]
            refused, said = self._refused(built)
            if refused:
                return said
            needed = self._needed(built, min_repeats)
            if built.count < needed:
                return why or self._too_short(built, needed)
            drift = self._drift(built)
            if drift is not None:  # peel the first segment: its dtype or shape may be that of the initial guess
                why = self._skip(Reason.DRIFT, built, drift[1], drift[0])
                start = first + period
                continue
            late, early = self._escapes(built)
            if early is not None:
                return self._skip(Reason.ESCAPES, built, f"used by {describe(early[1])}", early[0])
            if late is not None:  # peel the last segment: it stays in the graph as one attached step
                why = self._skip(Reason.ESCAPES, built, f"used by {describe(late[1])}", late[0])
                start, stop = first, first + (built.count - 1) * period
                continue
            return built
        return why

    def _refused(self, loop: Loop) -> tuple[bool, Skipped | None]:
        """Whether a loop is none of ours, however long it is and however it is peeled; and what is said of it."""
        strange = self._strange(loop)
        if strange is not None:
            return True, self._skip(Reason.NOT_PLAIN, loop, strange[1], strange[0]) if loop.count > 2 else None
        nested = self._nested_exit(loop)
        return nested is not None, None if nested is None else self._skip(Reason.NESTED_EXIT, loop, "", nested)

    def _too_short(self, loop: Loop, needed: int) -> Skipped | None:
        """What is said of a loop of too few repetitions: two like operations in a row are no loop worth a word."""
        return (
            None
            if loop.count < 3
            else self._skip(Reason.TOO_SHORT, loop, f"{loop.count} < {needed}; the option min_repeats lowers it", loop.nodes[0])
        )

    def _needed(self, loop: Loop, min_repeats: Any) -> int:
        """The least count of a loop. One whose exit depends on data was cut off by capture: its count says nothing."""
        markers = [node for node in loop.segment(-1) if is_passage(node.target)]
        if markers and all(self.exits[node.args[1:3]] >= UNROLLED for node in markers):
            return min(min_repeats(loop.nodes), SEGMENTS_OF_A_CUT_LOOP)
        return int(min_repeats(loop.nodes))

    def _strange(self, loop: Loop) -> tuple[fx.Node, str] | None:
        found = foreign_among(loop.segment(-1))
        inside = next((node for node in loop.segment(-1) if node in self.transformed), None)
        if found is None and inside is not None:
            return inside, "inside of a torch.func transform"
        return found

    def _nested_exit(self, loop: Loop) -> fx.Node | None:
        """A test that a segment holds more than once: that of a loop inside of this one."""
        seen: set[str] = set()
        for node in loop.segment(-1):
            if is_passage(node.target):
                if node.args[1] in seen:
                    return node
                seen.add(str(node.args[1]))
        return None

    def _skip(self, reason: Reason, loop: Loop, detail: str, node: fx.Node) -> Skipped:
        place = location_of(node)
        return Skipped(reason, place if place.file else loop.location, detail, loop.count)

    def _build(self, start: int, stop: int, period: int) -> Loop | Skipped | None:
        """The rotation of a run that carries the least, from where on it can be counted in whole segments."""
        best: tuple[tuple[Any, ...], Loop] | None = None
        older = False
        for t in range(start, min(start + period, stop - 2 * period + 1)):
            count = (stop - t) // period
            found = self._classify(t, period, count)
            if found == "older":
                older = True
            if found is None or isinstance(found, str):
                continue
            carried, invariants = found
            nodes = self.nodes[t : t + count * period]
            loop = Loop(nodes, period, count, tuple(carried), tuple(carried.values()), tuple(invariants))
            # A run ends where its loop does, and may begin too early: what stood before may look like the body's end.
            left_over = (stop - t) % period
            key = (no_state(loop), len(carried), loss_of_precision(loop), width(loop), -count, left_over, t)
            if best is None or key < best[0]:
                best = key, loop
        if best is not None:
            return best[1]
        if older and (stop - start) // period >= 3:
            nodes = self.nodes[start : start + period]
            return Skipped(Reason.HIGHER_ORDER, common_location(nodes), "", (stop - start) // period)
        return None

    def _classify(self, t: int, p: int, count: int) -> tuple[dict[int, fx.Node], dict[fx.Node, None]] | str | None:
        """Carried offsets with the initial node of each, and invariants; a word or None where that does not work."""
        carried: dict[int, fx.Node] = {}
        invariants: dict[fx.Node, None] = {}
        last = t + (count - 1) * p
        for offset in range(p):
            slots = zip(self.args[t + offset], self.args[last - p + offset], self.args[last + offset], strict=False)
            for first, previous, final in slots:
                where = self.position.get(final, -1)
                if where >= last:
                    continue  # made in the same segment
                if final is previous:
                    if where >= t or first is not final:
                        return None
                    invariants[final] = None
                elif where >= last - p:
                    if not isinstance(value_of(final), torch.Tensor | Foreign):
                        return None  # a context manager or a counter: this rotation cuts through it
                    made = where - (last - p)
                    if self.position.get(first, -1) >= t or carried.get(made, first) is not first:
                        return None
                    carried[made] = first
                else:
                    return "older"
        return (carried, invariants) if carried else None

    def _drift(self, loop: Loop) -> tuple[fx.Node, str] | None:
        for initial, offset in zip(loop.initial, loop.carried, strict=True):
            before, after = value_of(initial), value_of(loop.segment(0)[offset])
            if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
                continue
            if str(before.shape) != str(after.shape) or before.dtype != after.dtype:
                detail = f"from {list(before.shape)} {before.dtype} to {list(after.shape)} {after.dtype}"
                return loop.segment(0)[offset], detail
        return None

    def _escapes(self, loop: Loop) -> tuple[tuple[fx.Node, fx.Node] | None, tuple[fx.Node, fx.Node] | None]:
        """(value, user) for values used outside: in the last two segments (peeling helps), and in earlier ones."""
        inside, late = set(loop.nodes), None
        carried = set(loop.carried)
        for i, node in enumerate(loop.nodes):
            segment, offset = divmod(i, loop.period)
            for user in node.users:
                if user in inside or (segment == loop.count - 1 and offset in carried):
                    continue
                if segment < loop.count - 2:
                    return None, (node, user)
                late = node, user
        return late, None

    # ---- what looks like a loop, and is none

    def near_misses(self, taken: Sequence[tuple[int, int]]) -> Iterator[Skipped]:
        """Chains that repeat an operation sequence but read other weights, other inputs or other constants each time."""
        n, used = len(self.nodes), list(taken)
        runs = []
        for p in sorted({q * m for q in candidate_periods(self.operation) for m in (1, 2) if q * m * 3 <= n}):
            i = 0
            while i + p < n:
                start = i
                while i + p < n and self.operation[i] == self.operation[i + p]:
                    i += 1
                if i - start >= 2 * p:
                    runs.append((start, i + p, p))
                i += 1
        for start, stop, p in sorted(runs, key=lambda run: (run[0] - run[1], run[2])):
            if any(start < b and a < stop for a, b in used) or not self._feeds_forward(stop - p, p):
                continue
            if p == 1 and stop - start < 5:  # a sum of three terms
                continue
            used.append((start, stop))
            reason, node = self._difference(stop - 2 * p, p)
            yield Skipped(reason, location_of(node), describe(node), (stop - start) // p)

    def _feeds_forward(self, last: int, p: int) -> bool:
        """Whether the last segment reads the one before at the place where that reads the one before it."""
        for i in range(last, last + p):
            for a, b in zip(self.args[i - p], self.args[i], strict=False):
                if last - p <= self.position.get(b, -1) < last and self.position.get(a, -1) == self.position[b] - p:
                    return is_tensor(b)
        return False

    def _difference(self, start: int, p: int) -> tuple[Reason, fx.Node]:
        for i in range(start, start + p):
            a, b = self.nodes[i], self.nodes[i + p]
            if isinstance(b.target, HigherOrderOperator):  # reads a submodule of its own each time
                return Reason.CONTROL_FLOW, b
            if constants(a) != constants(b):
                return Reason.OTHER_CONSTANT, b
            if str(meta_key(value_of(a))) != str(meta_key(value_of(b))):
                return Reason.DRIFT, b
            for x, y in zip(self.args[i], self.args[i + p], strict=False):
                inside = self.position.get(y, -1) - self.position.get(x, -1) == p
                if x is not y and not inside:
                    return Reason.OTHER_INPUT, b
        return Reason.HIGHER_ORDER, self.nodes[start + p]


def clip(start: int, stop: int, taken: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """What of [start, stop) the taken ranges leave at its ends; nothing where one lies in its middle."""
    for a, b in taken:
        if start < a and b < stop:
            return start, start
        if a <= start < b:
            start = b
        if a < stop <= b:
            stop = a
    return start, stop


def width(loop: Loop) -> int:
    """Elements of the state; symbolic sizes by their hint."""
    total = 0
    for offset in loop.carried:
        value = value_of(loop.segment(-1)[offset])
        if isinstance(value, torch.Tensor):
            total += math.prod(hint(s) for s in value.shape)
    return total


def no_state(loop: Loop) -> bool:
    """Whether what is carried is no real floating-point tensor: a rotation through an rfft, or through a mask."""
    values = (value_of(loop.segment(-1)[offset]) for offset in loop.carried)
    return not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)


def loss_of_precision(loop: Loop) -> int:
    """0 where all of the state is fp32 or wider: a rotation through a bf16 activation would round the state."""
    values = [value_of(loop.segment(-1)[offset]) for offset in loop.carried]
    return sum(isinstance(v, torch.Tensor) and v.is_floating_point() and v.element_size() < 4 for v in values)


def deduplicate_constants(graph: fx.Graph) -> None:
    """Let all reads of one attribute be one node, so that segments read the same node."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        first = seen.setdefault(node.target, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
