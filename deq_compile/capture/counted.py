"""Follow a loop whose count is an input: `for _ in range(n)`, with n an integer that has had another value in an earlier call, or
that Python draws in every call.

Dynamo would make n the number that it is, and a graph for each. For our backend the loop is traced as one of UNROLLED iterations,
with a `counted` in each that knows n: a region whose count comes with every call. Where no pass takes it, Dynamo traces the frame
again without all this. The range has to be all that ends the loop, and what is assumed of its iterations is what `loop_exit`
assumes: nothing but tensors tells one from another, or integers that count them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from deq_compile import markers
from deq_compile.report import Reason, Skipped

from . import decisions, dynamo, effects, observations, own_counts, sites
from .bytecode import Code, Exit, code_of
from .visits import Visits, grows, leaks, live_after, moves

_TABLE = "_deq_compile_counted"
_ENTERED = "_deq_compile_entered"  # sites of loops that are entered and not left
_is_on = False  # whether a range is looked at: who reads a number for one has to know


@dataclasses.dataclass
class _Passage:
    """One passage through a loop that is followed.

    count   as the graph has it
    visits  what was noted at each iteration
    begins  the numbers in sight before the first; names: what local names stood for
    """

    site: str
    count: Any
    visits: Visits
    begins: dict[Any, Any] = dataclasses.field(default_factory=dict)
    names: dict[str, Any] = dataclasses.field(default_factory=dict)


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patches out again."""
    global _is_on
    undo = [
        dynamo.patch_instructions({"FOR_ITER": _handler}),
        dynamo.patch_calls(_call_handler),
        dynamo.patch_builder(own_counts.builder),
        dynamo.patch_run(_run_handler),
    ]

    _is_on = True

    def remove() -> None:
        global _is_on
        _is_on = False
        for restore in undo:
            restore()

    return remove


def _call_handler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if getattr(fn, "fn", None) is range and sites.ours(self):
            with sites.guarded(self, "looking at the count of a loop"):
                loop = _to_follow(self, args)
                args = args if loop is None else _followed(self, args, *loop)
        return original(self, fn, args, kwargs)

    return call_function


def _run_handler(original: Callable[..., Any]) -> Callable[..., Any]:
    """What traces a frame, again without the loops that it stood in where it fails: it may have made more iterations than there
    are (`x[k]` of fewer than UNROLLED rows)."""

    @functools.wraps(original)
    def run(self: Any) -> Any:
        try:
            return original(self)
        except dynamo.RestartAnalysis:
            raise
        except Exception:
            entered = [] if self.parent is not None else self.output.__dict__.get(_ENTERED)
            if entered:
                sites.retrace(entered)
            raise

    return run


def _handler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        passage = self.__dict__.get(_TABLE, {}).get(id(inst))
        if passage is not None:
            with sites.guarded(self, "following a loop whose count is an input"):
                _visit(self, inst, passage)
        return original(self, inst)

    return handle


def _to_follow(tx: Any, args: Sequence[Any]) -> tuple[Any, str] | None:
    """The FOR_ITER of the loop that runs through a range up to a number that other calls may have otherwise, and its site; None
    where the range is left to Dynamo."""
    code = code_of(tx)
    inst = code.loop_through(tx.current_instruction)
    known = len(args) == 1 or (len(args) == 2 and args[0].is_python_constant())
    if inst is None or not known or not _may_be_followed(tx, code, inst):
        return None
    if not dynamo.is_open(tx, args[-1]):
        own_counts.note(tx, args[-1:])
        return None
    site = _site(tx, inst)
    return None if sites.blocked(tx, site) else (inst, site)


def is_to_be_followed(tx: Any) -> bool:
    """Whether the number that the instruction at work reads is the count of a loop that will be followed, and nothing else."""
    code = code_of(tx)
    inst = code.loop_counted_by(tx.current_instruction) if _is_on else None
    return inst is not None and _may_be_followed(tx, code, inst) and not sites.blocked(tx, _site(tx, inst))


def _may_be_followed(tx: Any, code: Code, inst: Any) -> bool:
    """Whether a loop of this frame is one of its own: what asks a generator makes its iterations, and of a loop that another
    repeats that one is to be looked at."""
    return not (code.yields or tx.export) and _ends_it(code, inst) and not any(map(_repeats, dynamo.frames(tx)))


def _repeats(tx: Any) -> bool:
    """Whether the instruction at work stands in a loop that is not one over a list of things."""
    if tx.current_instruction is None or not code_of(tx).in_loop(tx.current_instruction):
        return False
    kinds = [name for v in tx.stack if "Iterator" in (name := type(v).__name__)]
    return not kinds or any(kind.startswith(("Range", "Count")) for kind in kinds)


def _site(tx: Any, inst: Any) -> str:
    """A loop in a frame, and how that frame was reached."""
    return sites.site_of(tx.parent, tx.f_code.co_filename, tx.f_code.co_name, "range", code_of(tx).index[id(inst)])


def _followed(tx: Any, args: Sequence[Any], inst: Any, site: str) -> Sequence[Any]:
    """The arguments of the range that is traced in the place of that one; its own where the count is known, or is small, and had
    better be."""
    first = args[0].as_python_constant() if len(args) == 2 else 0
    end = dynamo.number_in(tx, args[-1]) if dynamo.is_integer_tensor(args[-1]) else args[-1]
    if not dynamo.is_symbolic(end):
        return [*args[:-1], end]
    count = dynamo.traced(tx, _traced_drawn if dynamo.is_unknown(end) else _traced_count, first, end)
    if not dynamo.is_symbolic(count) or not dynamo.may_be(count, markers.LEAST):
        return [*args[:-1], dynamo.build(tx, dynamo.constant(tx, end))]
    table: dict[str, Visits] = tx.output.__dict__.setdefault("_deq_compile_visits", {})
    before = table.get(site)
    visits = table[site] = Visits(0 if before is None else before.entry + 1, 0, None)
    tx.__dict__.setdefault(_TABLE, {})[id(inst)] = _Passage(site, count, visits)
    tx.output.__dict__.setdefault(_ENTERED, []).append(site)
    return [dynamo.build(tx, first), dynamo.build(tx, first + markers.UNROLLED)]


def _ends_it(code: Code, inst: Any) -> bool:
    """Whether the end of its range is all that ends a loop, but for what raises."""
    exit = code.exit_of(inst)
    return exit is not None and all(
        j in exit.loop or code.instructions[i] is inst or code.only_raises(j) for i in exit.loop for j in code.successors[i]
    )


def _visit(tx: Any, inst: Any, passage: _Passage) -> None:
    """Take note of an iteration to come, or of the end; the frame is traced again where the loop is not to be followed."""
    exit, visits = code_of(tx).exit_of(inst), passage.visits
    assert exit is not None
    why = grows(tx, inst, exit, visits)
    if visits.seen:
        why = why or leaks(tx, inst, exit, visits) or moves(tx, exit, visits)
    else:
        passage.begins = visits.history.pop()  # what was before the loop is no part of what its iterations do
        passage.names = dict(tx.symbolic_locals)
    visits.seen += 1
    visits.decided.append(len(decisions.log(tx)))
    if why is None and visits.seen > markers.UNROLLED:
        why = _left(tx, inst, exit, passage)
    if why is not None:
        sites.refuse(tx, passage.site, Skipped(why[0], sites.location(tx), why[1]))
        sites.retrace([passage.site])
    if visits.seen <= markers.UNROLLED:
        arguments = (passage.count.as_proxy(), passage.site, visits.entry, False)
        visits.markers.append(tx.output.create_proxy("call_function", markers.counted, arguments, {}).node)


def _left(tx: Any, inst: Any, exit: Exit, passage: _Passage) -> tuple[Reason, str] | None:
    """The loop ends: let what has counted its iterations be what the count makes of it. Why that cannot be, or why the iterations
    that were not traced may be others."""
    visits, code = passage.visits, code_of(tx)
    del tx.__dict__[_TABLE][id(inst)]
    tx.output.__dict__[_ENTERED].remove(passage.site)
    for node in visits.markers:
        node.args = (*node.args[:3], True)
    later = decisions.turns_later(tx, code, exit, visits.decided, 0, alone=True)
    if later is not None:
        return Reason.COUNTER, later
    names = sorted(live_after(tx, inst, exit) & code.stores(exit.loop))
    if dynamo.is_unknown(passage.count) and (other := _other_without(tx, passage, names)):
        return Reason.COUNTER, f"{other!r} would be another after no iteration, and nothing is known of the count"
    for name in names:
        key = observations.LOCAL, 0, name
        if observations.step(visits.history, key):
            last = _last(tx, passage, key)
            if last is None:
                return Reason.COUNTER, f"{name!r} is written in the loop and read after it"
            tx.symbolic_locals[name] = last
    for key in effects.changes(visits.before, visits.world):
        if key[0] in effects.ATTRIBUTES and effects.is_data(tx, visits.world[key][1]) and not dynamo.is_unknown(passage.count):
            continue
        last = _last(tx, passage, key) if key[0] in effects.ATTRIBUTES else None
        if last is None:
            return Reason.SIDE_EFFECT, f"{effects.words(key)} changes in every iteration"
        tx.output.side_effects.store_attr(effects.owner_of(tx, key), key[-1], last)
    return None


def _other_without(tx: Any, passage: _Passage, names: Sequence[str]) -> str | None:
    """The name of what a loop of no iterations leaves otherwise than iterations do. Numbers that move are looked at elsewhere; of
    tensors the graph says what they are then."""
    ends = []
    for name in names:
        before, after = passage.names.get(name), tx.symbolic_locals.get(name)
        if observations.step(passage.visits.history, (observations.LOCAL, 0, name)):
            continue
        if before is None or after is None or type(before) is not type(after):
            return name
        if isinstance(after, dynamo.TensorVariable):
            ends.append((after.as_proxy(), before.as_proxy()))
        elif effects.is_data(tx, after) or effects.mark(tx, before) != effects.mark(tx, after):
            return name
    afters, befores = [a for a, _ in ends], [b for _, b in ends]
    arguments = (None, passage.site, passage.visits.entry, afters, befores)
    tx.output.create_proxy("call_function", markers.after_none, arguments, {})
    return None


def _last(tx: Any, passage: _Passage, key: Any) -> Any:
    """The variable of what an integer comes to that moves by equal steps; None for any other number, and where the loop may make
    no iteration and would leave another number than that."""
    history = passage.visits.history
    moved: Any = observations.step(history, key)
    first: Any = history[0].get(key)
    if not isinstance(moved, int) or first is None:
        return None
    if dynamo.is_unknown(passage.count) and passage.begins.get(key) != first - moved:
        return None
    return dynamo.traced(tx, _traced_last, first, moved, passage.count)


# ---- traced by Dynamo from here on


def _traced_count(first: Any, end: Any) -> Any:
    return end - first if first else end


def _traced_drawn(first: Any, end: Any) -> Any:
    return max(end - first, 0)


def _traced_last(first: Any, moved: Any, count: Any) -> Any:
    return first + moved * (count - 1)
