"""Progress bars around a loop: `for k in tqdm(range(n))` and `trange(n)` are the range, where the loop is solved.

The bar then shows nothing: a solve has no iterations of the loop's to show. Where the loop is none that is solved, Dynamo traces
the frame again with the bar left to it. No bar is known by import: tqdm need not be installed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from deq_compile.report import Location, Reason, Region, Skipped

from . import dynamo, sites
from .bytecode import code_of

_FIX = "Dynamo cannot follow a bar that has a name: `for k in tqdm(range(n))`, or make it outside of what is compiled"


@dataclasses.dataclass(frozen=True)
class _Bar:
    site: str
    location: Location
    lines: range  # of the loop
    solved: list[Region] = dataclasses.field(default_factory=list)


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patch out again."""
    return dynamo.patch_calls(_handler)


def _handler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if sites.ours(self):
            with sites.guarded(self, "looking at a progress bar"):
                through = _range_below(self, fn, args, kwargs)
            if through is not None:
                self.push(through)
                return None
        return original(self, fn, args, kwargs)

    return call_function


def _range_below(tx: Any, fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The range that a bar runs through, in a `for` that has no name for the bar; None otherwise."""
    kind = _kind(fn)
    if not kind:
        return None
    lines = _lines_of_the_loop(tx) if args else None
    if lines is None:
        sites.tell(tx, Skipped(Reason.NOT_TRACED, sites.location(tx), _FIX))
    if lines is None or not all(v.is_python_constant() for v in kwargs.values()):
        return None
    if kind == "trange":
        through = dynamo.build(tx, range).call_function(tx, list(args), {})
    else:
        through = args[0].realize() if hasattr(args[0], "realize") else args[0]
    bar = _Bar(sites.site_of(tx, "bar"), sites.location(tx), lines)
    if type(through).__name__ != "RangeVariable" or sites.blocked(tx, bar.site):
        return None
    tx.output.__dict__.setdefault("_deq_compile_bars", []).append(bar)
    return through


def _kind(fn: Any) -> str:
    fn = fn.realize() if type(fn) is dynamo.LazyVariableTracker else fn
    known = fn.__dict__.get("value", fn.__dict__.get("fn"))
    if isinstance(known, type):
        return "tqdm" if any(c.__module__ == "tqdm.std" and c.__name__ == "tqdm" for c in known.__mro__) else ""
    ours = str(getattr(known, "__module__", "")).split(".")[0] == "tqdm"
    return "trange" if ours and getattr(known, "__name__", "") in ("trange", "tnrange") else ""


def _lines_of_the_loop(tx: Any) -> range | None:
    code = code_of(tx)
    loop = code.loop_through(tx.current_instruction)
    if loop is None:
        return None
    start, end = code.index[id(loop)], code.index[id(loop.target)]
    lines = [inst.positions.lineno for inst in code.instructions[start:end] if inst.positions and inst.positions.lineno]
    return range(min(lines), max(lines) + 1) if lines else None


def solved(region: Region, nodes: Iterable[fx.Node]) -> None:
    """Take note that a loop of these nodes is a region, and tell it of its bar."""
    traces = [node.meta.get("stack_trace") or "" for node in nodes]
    for bar in _bars():
        lines = [f'File "{bar.location.file}", line {line},' for line in bar.lines]
        if any(line in trace for trace in traces for line in lines):
            bar.solved.append(region)
            region.notes = (*region.notes, f"the bar in line {bar.location.line} shows nothing: the loop is solved")


def unshown() -> list[str]:
    """The sites of the bars in the graph at work whose loops hold no region."""
    return [bar.site for bar in _bars() if not bar.solved]


def _bars() -> list[_Bar]:
    tx = dynamo.current()
    found: list[_Bar] = [] if tx is None else tx.output.__dict__.get("_deq_compile_bars", [])
    return found
