"""The parts of `bench gpu`, their groups and seconds, in the order in which they tell most; two calls hold all of them.

A group is a process of its own, with seconds of its own that include its start: a crash, a hang or a broken device context costs
that group and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

CALL_SECONDS = 560  # of one call of ten minutes: imports and the table at its end have to fit, too
GRACE = 5  # seconds that a group has beyond its own before it is stopped


@dataclass(frozen=True)
class Group:
    """A process: a part, or one of several groups of it, its seconds, and the call that it belongs to (1 or 2; 0: both)."""

    part: str
    name: str
    seconds: float
    call: int

    @property
    def label(self) -> str:
        return f"{self.part}.{self.name}" if self.name else self.part


# What decides comes first: does one compiled model run through all engines at all; then which hypotheses about the device hold.
PLAN = (
    Group("facts", "", 20, 0),
    Group("first", "", 75, 1),
    Group("probe", "condition", 30, 1),
    Group("probe", "engines", 55, 1),
    Group("probe", "race", 30, 1),
    Group("probe", "failures", 25, 1),
    Group("correct", "kernels", 55, 1),
    Group("correct", "adjoints", 30, 1),
    Group("correct", "models", 100, 1),
    Group("experiments", "", 90, 1),
    Group("kernels", "", 70, 2),
    Group("steps", "mlp128", 35, 2),
    Group("steps", "mdeq", 60, 2),
    Group("steps", "lm", 60, 2),
    Group("steps", "mlp1024", 25, 2),
    Group("steps", "conv", 25, 2),
    Group("steps", "flow", 45, 2),
    Group("steps", "graph", 40, 2),
    Group("steps", "mlp1024wide", 25, 2),
    Group("steps", "transformer", 25, 2),
)
TUNING = Group("tuning", "", 240, 0)
# Compiling in parallel goes on beside `facts` and `first`; whatever comes after them waits for its end, this long at most.
COMPILING = {1: 140.0, 2: 120.0, 0: 140.0}
BESIDE_COMPILING = ("facts", "first")


def parts() -> list[str]:
    return list(dict.fromkeys(group.part for group in PLAN))


def of_call(call: int) -> list[Group]:
    """The groups of call 1 or 2, or all of them for 0."""
    return [group for group in PLAN if call == 0 or group.call in (0, call)]


def rehearsed() -> list[Group]:
    """What a rehearsal runs unless it is told otherwise: every part, of the steps one workload with integer operands."""
    return [group for group in PLAN if group.part != "steps" or group.name == "graph"]


def chosen(spec: str, call: int) -> list[Group]:
    """What ``--parts`` says: names of parts or groups, each with its seconds if wanted, as in ``first=60,probe=90,steps.lm=120``.

    A part with several groups shares its seconds out as the plan does. The order is the one given; "" is all of the call.

    Raises:
        SystemExit: an unknown name, or seconds that are no positive number.
    """
    if not spec:
        return of_call(call)
    found: list[Group] = []
    for entry in spec.split(","):
        name, _, seconds = entry.partition("=")
        found += _scaled(_named(name), name, seconds)
    return found


def _named(name: str) -> list[Group]:
    groups = [g for g in (*PLAN, TUNING) if name in (g.part, g.label)]
    if not groups:
        known = ", ".join([*parts(), TUNING.part, *(g.label for g in PLAN if g.name)])
        raise SystemExit(f"--parts: expected some of {known}; got {name!r}")
    return groups


def _scaled(groups: Sequence[Group], name: str, seconds: str) -> list[Group]:
    if not seconds:
        return list(groups)
    try:
        total = float(seconds)
    except ValueError:
        total = 0.0
    if not total > 0:
        raise SystemExit(f"--parts: expected seconds above 0 for {name}, as in {name}=60; got {seconds!r}")
    planned = sum(g.seconds for g in groups)
    return [replace(g, seconds=total * g.seconds / planned) for g in groups]
