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
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .option_rules import (
    ALIASES,
    BACKWARD_TOL_DEFAULT,
    BACKWARD_TOL_EXACT,
    RULES,
    OptionError,
    check_name,
    check_together,
    paired,
    parse_value,
    reversible,
)

__all__ = ["BACKWARD_TOL_DEFAULT", "BACKWARD_TOL_EXACT", "Config", "OptionError", "Options"]


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
    ``solver``                 "auto"         "broyden", "anderson", "picard"; "auto": of these whichever has been seen to be less
                                              work (on a CPU; elsewhere Broyden);
                                              "reversible": two coupled iterations, and the exact gradient of their steps
                                              (arXiv 2509.12917)
    ``anderson_memory``        8              differences that Anderson acceleration keeps
    ``anderson_damping``       1.0            its mixing, 0 < β ≤ 1
    ``relaxation``             0.8            of "reversible", 0 < β < 1: z ← (1 − β) z + β f(y)
    ``backward``               "reuse"        "reuse"; "exact": "reuse" with ``backward_tol=1e-6``;
                                              "jfb": Jacobian-free; "phantom", "neumann": ``backward_steps`` products;
                                              "unroll": the loop's own gradient, at the loop's iterates;
                                              "reversible": of that solver, which implies it
    ``backward_steps``         5              k of phantom(k, τ) and of neumann(k)
    ``backward_damping``       0.5            τ of phantom(k, τ)
    ``attached``               "keep"         "keep" the Jacobian-free gradient of one attached step
                                              ("implicit" is planned)
    ``backward_tol``           1e-2           relative adjoint residual at which refinement stops; inf: one raw
                                              reuse, as in Nguyen & Mauch 2023 (arXiv 2304.11663)
    ``backward_max_iter``      40             cap on the vector-Jacobian products of the refinement
    ``reuse``                  "auto"         whether the adjoint is preconditioned with the forward's factors: "always", "never";
                                              "auto": on a CPU where that has been seen to save more than it costs
    ``recycle``                "never"        whether training calls begin with what earlier batches have learnt of
                                              the inverse Jacobian, forward and adjoint: "always", "never"; "auto":
                                              where that has been seen to save more than it costs; on a GPU only where
                                              the host drives the iteration (see ``engine``)
    ``warm_start``             "never"        "previous": a solve begins from the last fixed point of the same shapes, and its
                                              adjoint from the last w, where those are nearer. Where the fixed point is
                                              meant (`fixed_point`, ``semantics="equilibrium"``); of several, the last is
                                              followed
    ``factor_dtype``           None           dtype of the stored steps; None: the state's
    ``batch``                  "auto"         "rows": dim 0 is a batch; "whole": one coupled system;
                                              "auto": probed once
    ``min_repeats``            7              shorter chains are left alone
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
    relaxation: float | None = None
    backward: str | None = None
    backward_steps: int | None = None
    backward_damping: float | None = None
    attached: str | None = None
    backward_tol: float | None = None
    backward_max_iter: int | None = None
    reuse: str | None = None
    recycle: str | None = None
    warm_start: str | None = None
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
            object.__setattr__(self, name, parse_value(name, value))
        check_together(self.explicit())
        mode, tol = ALIASES.get(self.backward or "", (None, None))
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
            check_name(name)
        return cls(**options)

    def explicit(self) -> dict[str, Any]:
        """The fields that somebody set, in the order of the table."""
        return {name: value for name in RULES if (value := getattr(self, name)) is not None}

    def merge(self, inner: Options) -> Options:
        """These options with those of ``inner`` (a decorator inside the outer compile) on top.

        What ``inner`` set holds; the rest comes from here. Inductor settings merge one by one. ``backward="exact"``
        and ``backward_tol`` speak of the same thing, so the inner one of them replaces the outer one of either. So do
        ``solver="reversible"`` and the options of other backwards.
        """
        values, over = self.explicit(), inner.explicit()
        if reversible(over) or (reversible(values) and not {"solver", "backward"}.isdisjoint(over)):
            for name in ("solver", "backward", "reuse", "recycle"):
                values.pop(name, None)
        if over.get("backward") in ALIASES:
            values.pop("backward_tol", None)
        elif "backward_tol" in over and values.get("backward") in ALIASES:
            values["backward"], _ = ALIASES[values["backward"]]
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
            check_name(name, "hint")
        said = {name: parse_value(name, value, "hint") for name, value in hints.items() if value is not None}
        options, said = paired(self.explicit()), paired(said)
        for given in (options, said) if "backward" not in options else (options,):
            if given.get("backward") in ALIASES:
                _, given["backward_tol"] = ALIASES[given["backward"]]

        values: dict[str, Any] = {}
        provenance: dict[str, str] = {}
        for name, rule in RULES.items():
            source = "option" if name in options else "model" if name in said else "default"
            values[name] = {"option": options, "model": said}.get(source, {name: rule.default})[name]
            provenance[name] = source
        values["backward"], _ = ALIASES.get(values["backward"], (values["backward"], None))
        check_together(values)
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
    relaxation: float
    backward: str
    backward_steps: int
    backward_damping: float
    attached: str
    backward_tol: float
    backward_max_iter: int
    reuse: str
    recycle: str
    warm_start: str
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
        plain = _plain({name: getattr(self, name) for name in RULES})
        assert isinstance(plain, dict)
        return plain

    def key(self) -> str:
        """16 hexadecimal digits that name these values, the same in every process: a part of cache keys."""
        return hashlib.sha256(_canonical(self.as_dict()).encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked as options are; the provenance of a changed field is kept."""
        for name in changes:
            check_name(name)
        checked: dict[str, Any] = {
            name: value if value is None and name in ("factor_dtype", "loop_memory") else parse_value(name, value)
            for name, value in changes.items()
        }
        return dataclasses.replace(self, **checked)
