"""A line that was said in every iteration, as one that can be said after the loop: what in it counts, what the graph computes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import dynamo, effects

_NUMBER = re.compile(r"(\d+)")
_PLAIN = (str, int, float, bool, type(None))
Given = Sequence[tuple[Sequence[Any], Mapping[str, Any]]]  # arguments by visit


@dataclasses.dataclass(frozen=True)
class Counts:
    """A number that moves by equal steps from iteration to iteration."""

    first: float
    step: float


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A number that is known when the line is said: which one, and how it is written."""

    place: int
    written: str = ""


class Spoken:
    """The line, to be called with the numbers for its slots. Its parts are constants, slots, and lists of texts and slots."""

    def __init__(self, function: Callable[..., Any], parts: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        self.function, self.parts, self.keywords = function, parts, dict(keywords)

    def __call__(self, *numbers: Any) -> None:
        def value(part: Any) -> Any:
            if isinstance(part, _Slot):
                number = numbers[part.place]
                return part.written.format(number) if part.written else number
            return "".join(str(value(piece)) for piece in part) if isinstance(part, list) else part

        self.function(*(value(part) for part in self.parts), **self.keywords)


@dataclasses.dataclass
class Text:
    spoken: Spoken
    slots: list[Any]  # a `Counts`, or a variable of Dynamo's


def may_be_said(variable: Any) -> bool:
    """A plain constant, a tensor, a number read from one, or a text made of those."""
    variable = variable.realize() if hasattr(variable, "realize") else variable
    if dynamo.is_text(variable):
        return not variable.sym_kwargs and all(may_be_said(v) for v in variable.sym_args)
    if isinstance(variable, dynamo.TensorVariable | dynamo.SymNodeVariable):
        return effects.depends_on_data(variable)
    return bool(variable.is_python_constant()) and isinstance(variable.as_python_constant(), _PLAIN)


def of(function: Callable[..., Any], given: Given, earlier: int) -> Text | None:
    """The line; `earlier` iterations did not say it. None where a part of it changes in another way."""
    slots: list[Any] = []
    if len(given) < 3 or len({(len(args), *kwargs) for args, kwargs in given}) > 1:
        return None
    keywords = {name: [kwargs[name] for _, kwargs in given] for name in given[0][1]}
    try:
        parts = [_part([args[i] for args, _ in given], slots) for i in range(len(given[0][0]))]
        said = {name: _part(values, slots) for name, values in keywords.items()}
    except LookupError:
        return None
    if any(isinstance(part, _Slot | list) for part in said.values()):
        return None
    slots = [Counts(s.first - earlier * s.step, s.step) if isinstance(s, Counts) else s for s in slots]
    return Text(Spoken(function, parts, said), slots)


def _part(values: Sequence[Any], slots: list[Any]) -> Any:
    """One argument.

    Raises:
        LookupError: it changes in a way of its own.
    """
    values = [v.realize() if hasattr(v, "realize") else v for v in values]
    if any(dynamo.is_text(v) for v in values) or all(type(_constant(v)) is str for v in values):
        return _text([_pieces(v) for v in values], slots)
    if not values[-1].is_python_constant():
        return _slot(slots, values[-1])
    known = [_constant(v) for v in values]
    return _moving(known, slots)


def _moving(known: Sequence[Any], slots: list[Any]) -> Any:
    if all(type(v) is type(known[0]) and v == known[0] for v in known):
        return known[0]
    if not all(type(v) in (int, float) for v in known):
        raise LookupError
    steps = [b - a for a, b in itertools.pairwise(known)]
    if not all(math.isclose(s, steps[0], rel_tol=1e-9, abs_tol=1e-12) for s in steps):
        raise LookupError
    return _slot(slots, Counts(known[0], steps[0]))


def _slot(slots: list[Any], number: Any, written: str = "") -> _Slot:
    slots.append(number)
    return _Slot(len(slots) - 1, written)


def _constant(variable: Any) -> Any:
    return variable.as_python_constant() if variable.is_python_constant() else None


def _pieces(variable: Any) -> list[Any]:
    """A text as its words, its whole numbers, and pairs of a variable with how it is written."""
    if not dynamo.is_text(variable):
        return _words(_constant(variable))
    found, numbers = [], iter(variable.sym_args)
    for literal, field, how, conversion in string.Formatter().parse(variable.format_string):
        found += _words(literal)
        if field is not None:
            written = "{" + (f"!{conversion}" if conversion else "") + (f":{how}" if how else "") + "}"
            found += _field(next(numbers), written)
    return found


def _field(variable: Any, written: str) -> list[Any]:
    variable = variable.realize() if hasattr(variable, "realize") else variable
    if dynamo.is_text(variable) and written == "{}":
        return _pieces(variable)
    if variable.is_python_constant():
        return _words(written.format(variable.as_python_constant()))
    return [(variable, written)]


def _words(text: Any) -> list[Any]:
    if not isinstance(text, str):
        raise LookupError
    return [int(word) if word.isdigit() and str(int(word)) == word else word for word in _NUMBER.split(text) if word]


def _text(texts: Sequence[list[Any]], slots: list[Any]) -> Any:
    if len({len(pieces) for pieces in texts}) > 1:
        raise LookupError
    parts = []
    for pieces in zip(*texts, strict=True):
        if len({type(piece) for piece in pieces}) > 1:
            raise LookupError
        if isinstance(pieces[0], tuple):
            variable, written = pieces[-1]
            parts.append(_slot(slots, variable, written))
        else:
            parts.append(_moving(pieces, slots))
    return parts
