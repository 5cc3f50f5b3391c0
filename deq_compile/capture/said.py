"""What a loop prints or logs in every iteration: said once, after the loop, with the solve's numbers.

    for k in range(100):
        new = f(z)
        err = (new - z).norm().item()
        print(f"iteration {k}: {err:.2e}")       # one line, of the last iteration; stock Dynamo ends the graph here
        ...

While capture follows a loop its lines are kept back. When the loop is left, a line of which every number is the same in all
iterations, or counts them, or was read from a tensor in the last one, is handed to the code that runs behind the graph. Where the
loop is none that is solved, Dynamo traces the frame again with these places left to it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deq_compile import markers
from deq_compile.report import Location, Reason, Skipped

from . import dynamo, formats, observations, say_only, sites, wording
from .bytecode import Exit, code_of

LEVELS = ("debug", "info", "warning", "error", "critical", "log")
_OF_LOGGING = [getattr(logging, name) for name in LEVELS]


@dataclasses.dataclass
class _Line:
    """A statement that says something: where it stands, in every frame that is traced, and what it was given each time."""

    function: Callable[..., Any]
    frames: list[tuple[Any, int]]
    location: Location
    site: str
    met: dict[str, int]  # how often the test of each loop was passed by before it was said first
    given: list[tuple[Sequence[Any], Mapping[str, Any]]] = dataclasses.field(default_factory=list)


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patch out again."""
    undo = [formats.install(), dynamo.patch_calls(_handler), say_only.install()]

    def remove() -> None:
        for one in reversed(undo):
            one()

    return remove


def _handler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if sites.ours(self):
            with sites.guarded(self, "taking note of what a loop says"):
                function = _speaker(fn)
                say_only.call(self, fn, speaks=function is not None)
                if function is not None and _kept_back(self, function, args, kwargs):
                    self.push(dynamo.build(self, None))
                    return None
        return original(self, fn, args, kwargs)

    return call_function


def _speaker(fn: Any) -> Callable[..., Any] | None:
    """print, a function of `logging`, or a method of a logger; None for all else."""
    fn = fn.realize() if type(fn) is dynamo.LazyVariableTracker else fn
    known = fn.__dict__
    function = known.get("fn", known.get("value"))
    if function is print or any(function is one for one in _OF_LOGGING):
        return function
    bound_to, name = dynamo.method_of(fn)
    owner = None if bound_to is None else bound_to.__dict__.get("value")
    if isinstance(owner, logging.Logger) and name in LEVELS:
        return getattr(owner, name)
    return None


def _kept_back(tx: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a line that is said in a loop waits for the loop's end."""
    if tx.output.current_tracer.parent is not None:
        return False  # in a body of its own, from which nothing gets out
    frames = [(frame, code_of(frame).index.get(id(frame.current_instruction), -1)) for frame in dynamo.frames(tx)]
    if not any(code_of(frame).in_loop(frame.current_instruction) for frame, _ in frames):
        return False
    if not any(node.op == "call_function" for node in tx.output.graph.nodes):
        return False  # a graph without any might never reach a backend
    site = sites.site_of(tx, "said")
    if sites.blocked(tx, site) or not all(wording.may_be_said(a) for a in (*args, *kwargs.values())):
        return False
    lines: dict[Any, _Line] = tx.output.__dict__.setdefault("_deq_compile_lines", {})
    met = {name: visits.seen for name, visits in tx.output.__dict__.get("_deq_compile_visits", {}).items()}
    key = tuple((id(frame), index) for frame, index in frames)
    line = lines.setdefault(key, _Line(function, frames, sites.location(tx), site, met))
    line.given.append((list(args), dict(kwargs)))
    return True


def told(tx: Any, inst: Any, exit: Exit, place: tuple[str, int]) -> None:
    """Called when a loop is left that capture has followed: what its lines say in the place of all that they said."""
    lines: dict[Any, _Line] = tx.output.__dict__.get("_deq_compile_lines", {})
    test = code_of(tx).index[id(inst)]
    here = {key: index for key, line in lines.items() for frame, index in line.frames if frame is tx and index in exit.loop}
    forced = {k: v for k, v in say_only.forced(tx).items() if v[0] is tx and k[1].jump in exit.loop}
    for (_, branch), (_, site) in forced.items():
        if sum(index in branch.block for index in here.values()) != branch.lines:
            sites.retrace([site])  # it does something besides
    for key, index in here.items():
        line = lines[key]
        met = line.met.get(place[0], 0)
        earlier = 0 if met >= markers.UNROLLED else met - (index > test)  # iterations that did not say it
        text = wording.of(line.function, line.given, max(earlier, 0))
        if text is not None:
            _say(tx, place, line, text)
            del lines[key]
    for key in forced:
        if not any(k in lines and index in key[1].block for k, index in here.items()):
            del say_only.forced(tx)[key]


def _say(tx: Any, place: tuple[str, int], line: _Line, text: wording.Text) -> None:
    what = f"line {line.location.line} says"
    numbers = [_number(tx, place, slot, f"the number that {what}") for slot in text.slots]
    note = [dynamo.build(tx, v) for v in (*place, f"what {what} is said once, after the loop")]
    dynamo.UserFunctionVariable(_traced_note).call_function(tx, note, {})
    dynamo.say_behind_graph(list(dynamo.frames(tx))[-1], text.spoken, numbers)


def _number(tx: Any, place: tuple[str, int], slot: Any, what: str) -> Any:
    if isinstance(slot, wording.Counts):
        return observations.count(tx, place, slot.first, slot.step, what)
    return slot.call_method(tx, "detach", [], {}) if isinstance(slot, dynamo.TensorVariable) else slot


def unheard() -> list[str]:
    """The sites of what was kept back for no solve in the graph at work: lines, and branches taken for their sake."""
    tx = dynamo.current()
    if tx is None:
        return []
    lines: dict[Any, _Line] = tx.output.__dict__.get("_deq_compile_lines", {})
    for line in lines.values():
        name = getattr(line.function, "__name__", "it")
        detail = f"{name} says something else in each iteration; say it after the loop, or leave it out"
        sites.tell(tx, Skipped(Reason.SIDE_EFFECT, line.location, detail))
    return [*(line.site for line in lines.values()), *(site for _, site in say_only.forced(tx).values())]


# ---- traced by Dynamo from here on


def _traced_note(site: Any, entry: Any, note: Any) -> None:
    markers.told(site, entry, note, ())
