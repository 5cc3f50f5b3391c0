"""What each option may be: its default, and how a value is checked and brought to its type. One table for all."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from deq_compile.registry import BACKWARDS, SOLVERS, Registry

REVERSIBLE = "reversible"  # a solver and a backward mode that imply each other
BACKWARD_TOL_EXACT = 1e-6  # what backward="exact" stands for
# Names of a backward mode that stand for another one at a tolerance.
ALIASES = {"exact": ("reuse", BACKWARD_TOL_EXACT)}

# By the gradient study (python -m bench gradients, NOTES.md): the loosest power of ten at which the parameter gradient has a
# cosine of .999 with the exact one on every trained body; at 1e-1 one of five trainings of the recall task did not learn it.
BACKWARD_TOL_DEFAULT = 1e-2


class OptionError(ValueError):
    """An option that is none, or a value that an option cannot have: the user's to repair, so it always comes through."""


class Rule:
    """One option: its default, and how a value is checked and brought to its type.

    ``parse`` returns the value in its own type, or raises ValueError whose message says what was expected.
    """

    def __init__(self, default: Any, parse: Callable[[Any], Any]) -> None:
        self.default = default
        self.parse = parse


def _real(expected: str, accept: Callable[[float], bool]) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        if not isinstance(value, bool) and isinstance(value, numbers.Real) and accept(float(value)):
            return float(value)
        raise ValueError(f"expected {expected}")

    return parse


def _integer(minimum: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if not isinstance(value, bool) and hasattr(value, "__index__") and not isinstance(value, torch.Tensor):
            number = operator.index(value)
            if number >= minimum:
                return number
        raise ValueError(f"expected an integer of at least {minimum}")

    return parse


def _choice(*names: str, planned: tuple[str, ...] = ()) -> Callable[[Any], str]:
    """One of ``names``; those in ``planned`` are known, and refused as not implemented yet."""
    listed = ", ".join(repr(name) for name in names)

    def parse(value: Any) -> str:
        if isinstance(value, str) and value in names:
            return value
        if isinstance(value, str) and value in planned:
            raise ValueError(f"{value!r} is not implemented yet; expected one of {listed}")
        near = difflib.get_close_matches(value, (*names, *planned), n=1) if isinstance(value, str) else []
        raise ValueError(f"expected one of {listed}" + (f" (did you mean {near[0]!r}?)" if near else ""))

    return parse


def _named(registry: Registry[Any], *more: str) -> Callable[[Any], str]:
    """One of the names in a registry, as it is then, or of ``more``."""
    return lambda value: _choice(*registry.names(), *more)(value)


def _floating_dtype(value: Any) -> torch.dtype:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise ValueError("expected None, or a floating-point dtype or its name, such as torch.bfloat16 or 'bfloat16'")


def _patches(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("expected a dict of Inductor settings, such as {'max_autotune': True}")
    if value:  # another inner backend would never look at them
        from .torch_parts import list_options

        known = list_options() if list_options is not None else value
        for key in value:
            if key.replace("-", "_") not in known:
                near = difflib.get_close_matches(key, known, n=1)
                suggestion = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"expected settings of Inductor (torch._inductor.list_options()), not {key!r}{suggestion}")
    return dict(value)


_positive = _real("a finite number above 0", lambda x: x > 0 and math.isfinite(x))
_positive_or_inf = _real("a number above 0 (inf is allowed)", lambda x: x > 0)
_fraction = _real("a number in (0, 1]", lambda x: 0 < x <= 1)
_between = _real("a number between 0 and 1", lambda x: 0 < x < 1)

# The one table. A default of None is settled in `Options.resolve`, except those that mean something.
RULES: dict[str, Rule] = {
    "tol": Rule(1e-4, _positive),
    "stop_mode": Rule("rel", _choice("rel", "abs")),
    "max_iter": Rule(40, _integer(1)),
    "memory": Rule(None, _integer(1)),
    "solver": Rule("auto", _named(SOLVERS)),
    "anderson_memory": Rule(8, _integer(1)),
    "anderson_damping": Rule(1.0, _fraction),
    "relaxation": Rule(0.8, _between),
    "backward": Rule("reuse", _named(BACKWARDS, *ALIASES)),
    "backward_steps": Rule(5, _integer(1)),
    "backward_damping": Rule(0.5, _fraction),
    "attached": Rule("keep", _choice("keep", planned=("implicit",))),
    "backward_tol": Rule(BACKWARD_TOL_DEFAULT, _positive_or_inf),
    "backward_max_iter": Rule(40, _integer(0)),
    "reuse": Rule("auto", _choice("auto", "always", "never")),
    "recycle": Rule("never", _choice("auto", "always", "never")),
    "warm_start": Rule("never", _choice("never", "previous")),
    "factor_dtype": Rule(None, _floating_dtype),
    "batch": Rule("auto", _choice("auto", "rows", "whole")),
    "min_repeats": Rule(7, _integer(2)),
    "semantics": Rule("loop", _choice("loop", "equilibrium")),
    "verify": Rule("periodic", _choice("periodic", "first", "never")),
    "verify_tol": Rule(1e-3, _positive_or_inf),
    "loop_memory": Rule(None, _integer(1)),
    "hooks": Rule("take", _choice("take", "keep")),
    "engine": Rule("auto", _choice("auto", "while", "chunks", "loop")),
    "inner": Rule("inductor", _choice("inductor", "aot_eager", "eager")),
    "inductor": Rule({}, _patches),
}


def paired(values: dict[str, Any]) -> dict[str, Any]:
    """Options with the solver that a backward mode is of, and the other way around."""
    return values | dict.fromkeys(("solver", "backward"), REVERSIBLE) if reversible(values) else values


def reversible(values: Mapping[str, Any]) -> bool:
    """Whether options ask for the reversible iteration."""
    return REVERSIBLE in (values.get("solver"), values.get("backward"))


def check_together(values: Mapping[str, Any]) -> None:
    """Raise where options that somebody set contradict the reversible iteration, which leaves nothing but its own steps."""
    if not reversible(values):
        return
    for name, fitting in (
        ("solver", (REVERSIBLE,)),
        ("backward", (REVERSIBLE,)),
        ("reuse", ("auto", "never")),
        ("recycle", ("never",)),
    ):
        if values.get(name) not in (None, *fitting):
            raise OptionError(
                f"options of the 'deq' backend contradict each other: solver={REVERSIBLE!r} and backward={REVERSIBLE!r} are one "
                f"method, the iteration and the exact gradient of its steps; expected {name} to be {fitting[0]!r} or not given, "
                f"got {name}={values[name]!r}. Fix: drop one of them"
            )


def check_name(name: object, what: str = "option") -> None:
    if name in RULES:
        return
    if name == "options":
        raise OptionError(
            "unknown option 'options': expected options as keywords here, such as tol=1e-5. Fix: drop `options=`, or use `**`"
        )
    near = difflib.get_close_matches(str(name), RULES, n=1) or [rule for rule in RULES if str(name).startswith(rule)]
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    raise OptionError(
        f"unknown {what} {name!r} for the 'deq' backend{suggestion}\n"
        f"  known: {', '.join(RULES)}\n"
        f"  (settings of Inductor go into the option inductor={{...}})"
    )


def parse_value(name: str, value: Any, what: str = "option") -> Any:
    try:
        return RULES[name].parse(value)
    except ValueError as error:
        got = f"got {value!r} of type {type(value).__name__}"
        raise OptionError(f"bad value for {what} {name!r} of the 'deq' backend: {error}; {got}") from None
