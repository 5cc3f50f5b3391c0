"""Numbers that grow from call to call, beside a region: `self.calls += 1`, `self.seen["batches"] += 1`, `meter.update(k)`.

Dynamo guards the number that it read, so that every call would compile the model anew, until it gives it up. Where a graph holds
a region, it ends before such a statement: the region is compiled once, and the statement is Python's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deq_compile import markers

from . import dynamo, effects, observations, sites


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patch out again."""
    made = {"STORE_ATTR": (2, _attribute), "STORE_SUBSCR": (3, _item)}
    return dynamo.patch_instructions(
        {opcode: functools.partial(_handler, taken=taken, written=written) for opcode, (taken, written) in made.items()}
    )


def _attribute(tx: Any, inst: Any) -> tuple[Any, Any, Any]:
    """What is written, to which object, and under which name."""
    return tx.stack[-2], tx.stack[-1], inst.argval


def _item(tx: Any, inst: Any) -> tuple[Any, Any, Any]:
    key = tx.stack[-1]
    return tx.stack[-3], tx.stack[-2], key.as_python_constant() if isinstance(key, dynamo.ConstantVariable) else None


def _handler(original: Callable[..., Any], taken: int, written: Callable[..., tuple[Any, Any, Any]]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        grows = False
        if len(self.stack) >= taken and not self.one_graph and sites.ours(self):
            with sites.guarded(self, "looking at a number that is written"):
                grows = _grows(self, *written(self, inst))
        if grows:
            dynamo.build(self, dynamo.graph_break).call_function(self, [], {})
        return original(self, inst)

    return handle


def _grows(tx: Any, value: Any, owner: Any, name: Any) -> bool:
    """Whether a number that this call has read from an object is written to it, and a region stands in the graph."""
    if getattr(owner, "source", None) is None or not any(
        node.target is markers.leave or markers.is_passage(node.target) for node in tx.output.graph.nodes
    ):
        return False
    value = _looked_at(value)
    number = observations.number(value) is not None or isinstance(value, dynamo.SymNodeVariable)
    return number and observations.read_before(tx, (effects.ATTRIBUTES[0], id(owner), name)) and not _inside(tx)


def _looked_at(value: Any) -> Any:
    """A sum of numbers that Dynamo has put off looking at (torch 2.14), and so has not guarded yet; it would at the end."""
    return value.realize() if type(value).__name__ == "ComputedLazyConstantVariable" else value


def _inside(tx: Any) -> bool:
    """Whether the statement stands in what capture follows as one: a loop that it has entered and not left, or a map."""
    visits = tx.output.__dict__.get("_deq_compile_visits", {})
    if any(0 < visit.seen < markers.UNROLLED for visit in visits.values()):
        return True
    open_regions = [node.target for node in tx.output.graph.nodes if node.target in (markers.enter, markers.leave)]
    return open_regions.count(markers.enter) > open_regions.count(markers.leave)
