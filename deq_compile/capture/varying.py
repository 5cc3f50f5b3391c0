"""Loops whose count is another one at every call, `for _ in range(random.randint(8, 40))`: told, for a graph holds one count.

A count that comes from outside (an argument, an attribute) is traced anew for each value, up to Dynamo's limit. Those frames have
a region each and one compiled body between them, since bodies are shared by what they compute.
"""

from __future__ import annotations

from typing import Any

from deq_compile.report import Reason, Skipped

from . import dynamo, sites
from .bytecode import code_of

_CHANGED = (
    "an integer from outside, which is traced anew for each value (the loop's body is compiled once), until "
    "torch._dynamo.config.recompile_limit is reached and Python runs the function"
)
_FIX = "z = deq_compile.fixed_point(lambda z: f(z, x), z0) in the loop's place, if the fixed point is meant"


def range_called(tx: Any, function: Any, args: Any) -> None:
    """Tell of a `range` up to a number that Python draws in every call, or that has had another value in an earlier one."""
    if getattr(function, "fn", None) is not range:
        return
    if any(dynamo.is_drawn(a) for a in args):
        _tell(tx, "a random number")
    elif any(dynamo.has_changed(tx, a) for a in args):
        _tell(tx, _CHANGED)


def number_read(tx: Any) -> None:
    """Tell of a number read from a tensor, at the instruction at work, where it says how often a loop runs."""
    if code_of(tx).counts_a_loop(tx.current_instruction):
        _tell(tx, "a number read from a tensor")


def _tell(tx: Any, what: str) -> None:
    place = sites.location(tx)
    if not sites.has_told(tx, Reason.VARYING, place):  # torch 2.14 reads a random number as it reads one of a tensor
        sites.tell(tx, Skipped(Reason.VARYING, place, f"{what}; {_FIX}"))
