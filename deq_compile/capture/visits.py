"""What is noted at each visit of the place where a loop ends, and what says that its iterations differ in more than tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from deq_compile.report import Reason

from . import dynamo, effects, observations
from .bytecode import Exit, code_of


@dataclasses.dataclass
class Visits:
    """One passage through a loop: how often its test was met, the state of everything mutable then, and its iterator."""

    entry: int
    cap: int
    iterator: Any
    seen: int = 0
    world: Any = None
    before: Any = None  # the world at the visit before
    marks: dict[str, Any] = dataclasses.field(default_factory=dict)  # of local names, at the first visit
    objects: dict[str, int] = dataclasses.field(default_factory=dict)  # from outside, that names stand for, likewise
    history: observations.History = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)  # of the graph, at each of those times
    decided: list[int] = dataclasses.field(default_factory=list)  # likewise, of the log of decisions
    range: int | None = None  # its length at the first visit, 0 if it never ends, None if it is no range
    markers: list[Any] = dataclasses.field(default_factory=list)  # left in the graph so far


def live_after(tx: Any, inst: Any, exit: Exit) -> set[str]:
    """Names that are read after the loop."""
    code = code_of(tx)
    found: set[str] = dynamo.livevars_analysis(code.instructions, code.instructions[code.target(inst, exit)])
    return found


def leaks(tx: Any, inst: Any, exit: Exit, visits: Visits) -> tuple[Reason, str] | None:
    """Python values whose value after the loop would say when it was left. Those in cells others may write and read."""
    code = code_of(tx)
    for name in sorted((live_after(tx, inst, exit) & code.stores(exit.loop)) | set(tx.f_code.co_cellvars)):
        value = effects.held_in(tx, tx.symbolic_locals.get(name))
        if value is None or effects.is_data(tx, value):
            continue
        mark = effects.mark(tx, value)
        same = visits.marks.setdefault(name, mark) == mark
        if not same and observations.step(visits.history, (observations.LOCAL, 0, name)) is None:
            return Reason.COUNTER, f"{name!r} is written in the loop and read after it"
    return None


def moves(tx: Any, exit: Exit, visits: Visits) -> tuple[Reason, str] | None:
    """Objects from outside that another takes the place of in every iteration: what is read from later ones, nobody has seen."""
    code = code_of(tx)
    carried = dynamo.livevars_analysis(code.instructions, code.instructions[min(exit.loop)])
    for name in sorted(carried & code.stores(exit.loop)):
        which = effects.object_from_outside(tx.symbolic_locals.get(name))
        if which is not None and visits.objects.setdefault(name, which) != which:
            return Reason.COUNTER, f"{name!r} is another object in each iteration"
    return None


def says_how(tx: Any, inst: Any, exit: Exit) -> tuple[Reason, str] | None:
    """Python values that are set at one end of a loop, and not at the other."""
    code = code_of(tx)
    here, elsewhere = code.one_sided(inst, exit)
    for name in sorted(code.stores(here)):
        value = tx.symbolic_locals.get(name)
        if value is None or not effects.is_data(tx, value):
            return Reason.COUNTER, f"{name!r} says how the loop was left"
    if elsewhere and code.constants(here) != code.constants(elsewhere):
        return Reason.COUNTER, "a constant says how the loop was left"
    return None


def grows(tx: Any, inst: Any, exit: Exit, visits: Visits) -> tuple[Reason, str] | None:
    """Whether something that outlives the loop was changed since the last visit, and is nothing that a solve tells."""
    live = live_after(tx, inst, exit)
    visits.before, visits.world = visits.world, effects.snapshot(tx, live)
    visits.history.append(observations.numbers(tx, live & code_of(tx).stores(exit.loop), visits.world))
    if visits.before is None:
        return None
    for key in effects.changes(visits.before, visits.world):
        if not observations.is_told(tx, key, visits.before, visits.world, visits.history):
            return Reason.SIDE_EFFECT, f"{effects.words(key)} changes in every iteration"
    return None
