"""The options of the backend: what a user may set, what it means, and how it is settled.

Two dataclasses, and one way between them::

    Options.from_options({"tol": 1e-5})     # what somebody said; every field is None until it is set
        .merge(inner)                       # a decorator inside an outer torch.compile
        .resolve(tol=..., max_iter=...)     # what the user's own loop, solver call or library says (hints)
        -> Config                           # every field filled, each with its provenance

An explicit option beats a hint, which beats the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deq_compile.registry import BACKWARDS, SOLVERS, Registry

BACKWARD_TOL_EXACT = 1e-6  # what backward="exact" stands for
# Names of a backward mode that stand for another one at a tolerance.
_ALIASES = {"exact": ("reuse", BACKWARD_TOL_EXACT)}

# By the gradient study (python -m bench gradients, NOTES.md): the loosest power of ten at which the parameter gradient has a
# cosine of .999 with the exact one on every trained body; at 1e-1 one of five trainings of the recall task did not learn it.
BACKWARD_TOL_DEFAULT = 1e-2


class OptionError(ValueError):
    """An option that is none, or a value that an option cannot have: the user's to repair, so it always comes through."""


class _Rule:
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
        import torch._inductor

        known = torch._inductor.list_options()
        for key in value:
            if key.replace("-", "_") not in known:
                near = difflib.get_close_matches(key, known, n=1)
                suggestion = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"expected settings of Inductor (torch._inductor.list_options()), not {key!r}{suggestion}")
    return dict(value)


_positive = _real("a finite number above 0", lambda x: x > 0 and math.isfinite(x))
_positive_or_inf = _real("a number above 0 (inf is allowed)", lambda x: x > 0)
_fraction = _real("a number in (0, 1]", lambda x: 0 < x <= 1)

# The one table. A default of None is settled in `Options.resolve`, except those that mean something.
_RULES: dict[str, _Rule] = {
    "tol": _Rule(1e-4, _positive),
    "stop_mode": _Rule("rel", _choice("rel", "abs")),
    "max_iter": _Rule(40, _integer(1)),
    "memory": _Rule(None, _integer(1)),
    "solver": _Rule("broyden", _named(SOLVERS)),
    "anderson_memory": _Rule(5, _integer(1)),
    "anderson_damping": _Rule(1.0, _fraction),
    "backward": _Rule("reuse", _named(BACKWARDS, *_ALIASES)),
    "backward_steps": _Rule(5, _integer(1)),
    "backward_damping": _Rule(0.5, _fraction),
    "attached": _Rule("keep", _choice("keep", planned=("implicit",))),
    "backward_tol": _Rule(BACKWARD_TOL_DEFAULT, _positive_or_inf),
    "backward_max_iter": _Rule(40, _integer(0)),
    "reuse": _Rule("auto", _choice("auto", "always", "never")),
    "factor_dtype": _Rule(None, _floating_dtype),
    "batch": _Rule("auto", _choice("auto", "rows", "whole")),
    "min_repeats": _Rule(5, _integer(2)),
    "semantics": _Rule("loop", _choice("loop", "equilibrium")),
    "verify": _Rule("periodic", _choice("periodic", "first", "never")),
    "verify_tol": _Rule(1e-3, _positive_or_inf),
    "loop_memory": _Rule(None, _integer(1)),
    "hooks": _Rule("take", _choice("take", "keep")),
    "engine": _Rule("auto", _choice("auto", "while", "chunks", "loop")),
    "inner": _Rule("inductor", _choice("inductor", "aot_eager", "eager")),
    "inductor": _Rule({}, _patches),
}


def _check_name(name: object, what: str = "option") -> None:
    if name in _RULES:
        return
    near = difflib.get_close_matches(str(name), _RULES, n=1) or [rule for rule in _RULES if str(name).startswith(rule)]
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    raise OptionError(
        f"unknown {what} {name!r} for the 'deq' backend{suggestion}\n"
        f"  known: {', '.join(_RULES)}\n"
        f"  (settings of Inductor go into the option inductor={{...}})"
    )


def _parse(name: str, value: Any, what: str = "option") -> Any:
    try:
        return _RULES[name].parse(value)
    except ValueError as error:
        got = f"got {value!r} of type {type(value).__name__}"
        raise OptionError(f"bad value for {what} {name!r} of the 'deq' backend: {error}; {got}") from None


def _plain(value: Any) -> Any:
    """``value`` in a form that JSON writes the same in every process; a dtype by its name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(_plain(values), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What somebody set. Every field is None until then; None given explicitly means "not set".

    ========================== ============== =================================================================
    option                     default        meaning
    ========================== ============== =================================================================
    ``tol``                    1e-4           residual at which a sample stops, |f(z) − z| / (|f(z)| + eps)
    ``stop_mode``              "rel"          "rel": as above; "abs": |f(z) − z|
    ``max_iter``               40             cap on evaluations of the body
    ``memory``                 = max_iter     stored steps; when full, the solver restarts
    ``solver``                 "broyden"      "broyden", "anderson", "picard"
    ``anderson_memory``        5              differences that Anderson acceleration keeps
    ``anderson_damping``       1.0            its mixing, 0 < β ≤ 1
    ``backward``               "reuse"        "reuse", "jfb", "exact" (= "reuse" with ``backward_tol=1e-6``)
                                              "jfb": Jacobian-free; "phantom", "neumann": ``backward_steps`` products;
                                              "unroll": the loop's own gradient, at the loop's iterates
    ``backward_steps``         5              k of phantom(k, τ) and of neumann(k)
    ``backward_damping``       0.5            τ of phantom(k, τ)
    ``attached``               "keep"         "keep" the Jacobian-free gradient of one attached step
                                              ("implicit" is planned)
    ``backward_tol``           1e-2           relative adjoint residual at which refinement stops; inf: one raw
                                              reuse, as in Nguyen & Mauch 2023 (arXiv 2304.11663)
    ``backward_max_iter``      40             cap on the vector-Jacobian products of the refinement
    ``reuse``                  "auto"         whether the adjoint is preconditioned with the forward's factors: "always", "never";
                                              "auto": on a CPU where that has been seen to save more than it costs
    ``factor_dtype``           None           dtype of the stored steps; None: the state's
    ``batch``                  "auto"         "rows": dim 0 is a batch; "whole": one coupled system;
                                              "auto": probed once
    ``min_repeats``            5              shorter chains are left alone
    ``semantics``              "loop"         "loop": a fixed-count loop keeps its own result where that is not
                                              the fixed point; "equilibrium": the fixed point is meant
    ``verify``                 "periodic"     when a loop is compared with the user's own: "periodic", "first",
                                              "never"
    ``verify_tol``             1e-3           largest relative difference of that comparison
    ``loop_memory``            None           None: a kept loop saves for the backward what the user's own would. m: some
                                              N/m + m iterates are held at a time, and nothing else, at 2 N more
                                              evaluations (3 N where m < N)
    ``hooks``                  "take"         "take" recognised adjoint-solving hooks over, or "keep" them
    ``engine``                 "auto"         what the iterations run on, on a GPU: "while" (one CUDA graph with a WHILE node),
                                              "chunks" (a CUDA graph of some iterations), "loop"; "auto": the first that works
    ``inner``                  "inductor"     the backend of the rest: "inductor", "aot_eager", "eager"
    ``inductor``               {}             settings passed on to Inductor
    ========================== ============== =================================================================

    Raises:
        ValueError: a bad value; the message names the option, what was expected, and what was given.
    """

    tol: float | None = None
    stop_mode: str | None = None
    max_iter: int | None = None
    memory: int | None = None
    solver: str | None = None
    anderson_memory: int | None = None
    anderson_damping: float | None = None
    backward: str | None = None
    backward_steps: int | None = None
    backward_damping: float | None = None
    attached: str | None = None
    backward_tol: float | None = None
    backward_max_iter: int | None = None
    reuse: str | None = None
    factor_dtype: torch.dtype | None = None
    batch: str | None = None
    min_repeats: int | None = None
    semantics: str | None = None
    verify: str | None = None
    verify_tol: float | None = None
    loop_memory: int | None = None
    hooks: str | None = None
    engine: str | None = None
    inner: str | None = None
    inductor: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, value in self.explicit().items():
            object.__setattr__(self, name, _parse(name, value))
        mode, tol = _ALIASES.get(self.backward or "", (None, None))
        if mode is not None and self.backward_tol not in (None, tol):
            raise OptionError(
                f"options 'backward' and 'backward_tol' of the 'deq' backend contradict each other: {self.backward!r} is "
                f"backward={mode!r} with backward_tol={tol:g}; got backward_tol={self.backward_tol:g}. "
                f"Fix: drop one of them"
            )

    def __hash__(self) -> int:
        return hash(_canonical(self.explicit()))

    def key(self) -> str:
        """16 hexadecimal digits that name what somebody set, the same in every process."""
        return hashlib.sha256(_canonical(self.explicit()).encode()).hexdigest()[:16]

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | Options | None) -> Options:
        """Options from a mapping, such as the ``options=`` of ``torch.compile``.

        Raises:
            ValueError: an unknown key (the message lists the known ones and the nearest match) or a bad value.
        """
        if options is None:
            return cls()
        if isinstance(options, Options):
            return options
        if not isinstance(options, Mapping):
            raise OptionError(
                f"expected the options of the 'deq' backend as a dict such as {{'tol': 1e-5}}, got {options!r} of type "
                f"{type(options).__name__}"
            )
        for name in options:
            _check_name(name)
        return cls(**options)

    def explicit(self) -> dict[str, Any]:
        """The fields that somebody set, in the order of the table."""
        return {name: value for name in _RULES if (value := getattr(self, name)) is not None}

    def merge(self, inner: Options) -> Options:
        """These options with those of ``inner`` (a decorator inside the outer compile) on top.

        What ``inner`` set holds; the rest comes from here. Inductor settings merge one by one. ``backward="exact"``
        and ``backward_tol`` speak of the same thing, so the inner one of them replaces the outer one of either.
        """
        values, over = self.explicit(), inner.explicit()
        if over.get("backward") in _ALIASES:
            values.pop("backward_tol", None)
        elif "backward_tol" in over and values.get("backward") in _ALIASES:
            values["backward"], _ = _ALIASES[values["backward"]]
        if "inductor" in values and "inductor" in over:
            over["inductor"] = {**values["inductor"], **over["inductor"]}
        return Options(**{**values, **over})

    def resolve(self, **hints: Any) -> Config:
        """Settle every field: an option, else a hint, else the default.

        Args:
            hints: what the user's loop, solver call or library says, by option name; None says nothing.

        Raises:
            ValueError: an unknown or bad hint.
        """
        for name in hints:
            _check_name(name, "hint")
        said = {name: _parse(name, value, "hint") for name, value in hints.items() if value is not None}
        options = self.explicit()
        for given in (options, said) if "backward" not in options else (options,):
            if given.get("backward") in _ALIASES:
                _, given["backward_tol"] = _ALIASES[given["backward"]]

        values: dict[str, Any] = {}
        provenance: dict[str, str] = {}
        for name, rule in _RULES.items():
            source = "option" if name in options else "model" if name in said else "default"
            values[name] = {"option": options, "model": said}.get(source, {name: rule.default})[name]
            provenance[name] = source
        values["backward"], _ = _ALIASES.get(values["backward"], (values["backward"], None))
        if values["memory"] is None:
            values["memory"] = values["max_iter"]
        values["inductor"] = dict(values["inductor"])
        return Config(**values, provenance=provenance)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settled options of one region; the fields and their meaning are those of :class:`Options`.

    ``backward`` is never "exact" here, and ``memory`` is a number. ``factor_dtype`` None is the state's dtype.
    ``provenance`` says for every field who set it: "option", "model" (the user's loop, solver or library) or "default";
    it takes no part in comparison, hash or key.
    """

    tol: float
    stop_mode: str
    max_iter: int
    memory: int
    solver: str
    anderson_memory: int
    anderson_damping: float
    backward: str
    backward_steps: int
    backward_damping: float
    attached: str
    backward_tol: float
    backward_max_iter: int
    reuse: str
    factor_dtype: torch.dtype | None
    batch: str
    min_repeats: int
    semantics: str
    verify: str
    verify_tol: float
    loop_memory: int | None
    hooks: str
    engine: str
    inner: str
    inductor: dict[str, Any]
    provenance: dict[str, str] = field(compare=False)

    def __hash__(self) -> int:
        return hash(self.key())

    def as_dict(self) -> dict[str, Any]:
        """The settled values in a form for JSON: the dtype by its name, provenance left out."""
        plain = _plain({name: getattr(self, name) for name in _RULES})
        assert isinstance(plain, dict)
        return plain

    def key(self) -> str:
        """16 hexadecimal digits that name these values, the same in every process: a part of cache keys."""
        return hashlib.sha256(_canonical(self.as_dict()).encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked as options are; the provenance of a changed field is kept."""
        for name in changes:
            _check_name(name)
        checked: dict[str, Any] = {
            name: value if value is None and name in ("factor_dtype", "loop_memory") else _parse(name, value)
            for name, value in changes.items()
        }
        return dataclasses.replace(self, **checked)
