"""Which functions are fixed-point solvers, and what they return: by signature, and by what they do.

A function whose parameters are a map, an initial state, a tolerance and a cap is tried out once on a small contraction
whose fixed point is known. It is a solver if that point is what it finds, and the place of the point in what it returns, with
the names of the other fields, says how the result of a call is to be built. No source of any solver is looked at.
"""

from __future__ import annotations

import inspect
import os
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deq_compile.solve_info import SolveInfo
from deq_compile.torch_parts import pytree

from .batches import tests_whole_batch
from .fields import CAPS, MOST, SMALLER, field
from .trial import unnoticed

_MAPS = {"f", "fun", "func", "fn", "g", "function", "deq_func"}
_STATES = {"x0", "z0", "z_init", "x_init", "z", "x", "init", "y0", "u0", "h0", "z_0", "x_0", "initial"}
_TOLERANCES = ("tol", "eps", "tolerance", "f_tol", "rtol", "atol")
_CAPS = ("max_iter", "max_iters", "maxiter", "n_iter", "num_iter", "max_steps", "threshold", "f_thres", "iters", "steps")
_MODES = ("stop_mode", "mode")
_TIGHT, _LOOSE = 1e-8, 1e-2


@dataclass(frozen=True)
class Family:
    """How to read a call of a solver.

    f, z0, tol, cap, mode  names of its parameters; None where it has none
    absolute  its tolerance is one for |f(z) - z| of the whole batch, in the absence of a mode
    shape     what it returns, with "z" where the fixed point is: a word, ("tuple", part, ...) or ("dict", (key, part), ...)
    build     a function of (z, SolveInfo) that makes what it returns, in place of `shape`
    detached  it works under a no_grad of its own: its result has no gradient
    whole     its tolerance is relative, and that of the whole batch
    """

    f: str
    z0: str
    tol: str | None
    cap: str | None
    mode: str | None
    absolute: bool
    shape: Any
    build: Callable[[Any, SolveInfo], Any] | None = None
    detached: bool = False
    whole: bool = False


_registered: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_looks: weakref.WeakKeyDictionary[Any, dict[str, Any] | None] = weakref.WeakKeyDictionary()  # by code object
_known: weakref.WeakKeyDictionary[Any, dict[Any, Family | str | None]] = weakref.WeakKeyDictionary()


def register_solver(
    function: Callable[..., Any],
    /,
    *,
    f: int | str = 0,
    z0: int | str = 1,
    result: int | str | Callable[[Any, SolveInfo], Any] | None = None,
    tol: str | None = None,
    max_iter: str | None = None,
    stop_mode: str = "rel",
) -> Callable[..., Any]:
    """Name a function of your own as a fixed-point solver, so that models that call it get a region in its place.

    Args:
        function: called as `function(f, z0, ...)`; a plain Python function. Returned as it is, so this is also a decorator.
        f: position or name of the parameter that is the map.
        z0: that of the initial state, a tensor.
        result: where the fixed point is in what `function` returns: None if that is all it returns, an index of a tuple, a key
            of a dictionary; or a function of (z, info) that makes the returned value, where `info` is a
            :class:`SolveInfo`. With an index or key, `function` is tried out once on a small problem to learn the other fields.
        tol, max_iter: names of its parameters for the tolerance and the cap, where they are not the usual ones.
        stop_mode: "rel" or "abs", what its tolerance means.

    Raises:
        TypeError: no plain Python function, or a `result` of another kind.
        ValueError: a parameter that it does not have, one that is given two roles, or a bad `stop_mode`.
    """
    _check_registered(function, result, stop_mode)
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    optional = {role: name for role, name in (("tol", tol), ("max_iter", max_iter)) if name is not None}
    said = _roles_said({"f": f, "z0": z0, **optional}, names, function)
    left = [name for name in names if name not in said.values()]
    _registered[function] = {
        "f": said["f"],
        "z0": said["z0"],
        "result": result,
        "tol": said.get("tol") or _first(left, _TOLERANCES),
        "cap": said.get("max_iter") or _first(left, _CAPS),
        "mode": _first(left, _MODES),
        "absolute": stop_mode == "abs",
        "others": (),
    }
    _known.pop(function, None)
    return function


def _check_registered(function: Any, result: Any, stop_mode: Any) -> None:
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"register_solver: expected a plain Python function, got {type(function).__name__}")
    if isinstance(result, bool) or not (result is None or isinstance(result, int | str) or callable(result)):
        raise TypeError(
            f"register_solver: expected result to be None, an index, a key, or a function of (z, info), got {result!r}"
        )
    if stop_mode not in ("rel", "abs"):
        raise ValueError(f"register_solver: expected stop_mode 'rel' or 'abs', got {stop_mode!r}")


def _roles_said(given: Mapping[str, int | str | None], names: list[str], function: Any) -> dict[str, str]:
    """The parameter that has each role, by its position or name.

    Raises:
        ValueError: the function has no such parameter, or one of them has two roles.
    """

    def name_of(what: str, which: int | str | None) -> str:
        if isinstance(which, int) and not isinstance(which, bool) and -len(names) <= which < len(names):
            return names[which]
        if isinstance(which, str) and which in names:
            return which
        raise ValueError(f"register_solver: expected {what} among the parameters of {function.__name__}, {names}, got {which!r}")

    said = {role: name_of(role, which) for role, which in given.items()}
    for role, name in said.items():
        twice = [other for other in said if other != role and said[other] == name]
        if twice:
            raise ValueError(
                f"register_solver: expected {role} and {twice[0]} to be different parameters of {function.__name__}, {names}, "
                f"got {name!r} for both"
            )
    return said


def clear() -> None:
    """Forget what was found out about functions by looking at them and trying them out."""
    _looks.clear()
    _known.clear()


def roles_of(function: Any) -> dict[str, Any] | None:
    """Names of the parameters of a solver, by role; None for what does not look like one. Quick."""
    if not isinstance(function, types.FunctionType):
        return None
    code = function.__code__
    if function not in _registered and code not in _looks:
        _looks[code] = _signature(function)
    return _registered.get(function) or _looks[code]


def family_of(function: Any, dims: int, others: tuple[tuple[str, Any], ...] = ()) -> Family | str | None:
    """The family of a function for states of `dims` dimensions; a text where it is a solver that cannot be taken; or None.
    `others` are the arguments of a call that have no default, and no role (roles_of)."""
    if not isinstance(function, types.FunctionType):
        return None
    known = _known.get(function)
    if known is None:
        known = _known[function] = {}
    if (dims, others) not in known:
        known[dims, others] = _examine(function, dims, others)
    return known[dims, others]


def _first(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _examine(function: types.FunctionType, dims: int, others: tuple[tuple[str, Any], ...]) -> Family | str | None:
    facts = dict(roles_of(function) or {})
    if not facts:
        return None
    result, asked = facts.pop("result", "?"), facts.pop("others", ())
    if set(asked) != {name for name, _ in others}:
        return None  # it cannot be called without
    if result is None:
        return Family(**facts, shape="z")
    if callable(result):
        return Family(**facts, shape="z", build=result)
    wanted = None if result == "?" else result
    found = _tried(function, facts | {"others": others, "dtype": torch.float64}, dims, wanted)
    if isinstance(found, Exception):  # some make tensors of their own, in the default dtype
        again = _tried(function, facts | {"others": others, "dtype": torch.float32}, dims, wanted)
        found = found if isinstance(again, Exception) else again
    if not isinstance(found, Exception):
        return found
    return None if result == "?" else f"{function.__name__} could not be tried out: {type(found).__name__}: {found}"


def _tried(function: types.FunctionType, facts: dict[str, Any], dims: int, path: Any) -> Family | str | Exception | None:
    """What a trial says."""
    try:
        with torch.no_grad(), unnoticed():
            return _try_out(function, facts, dims, path)
    except Exception as error:  # whatever a function does that is called with what it did not expect
        return error


def _signature(function: types.FunctionType) -> dict[str, Any] | None:
    """Roles of the parameters of what looks like a solver."""
    file = function.__code__.co_filename
    if file.startswith((os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))):
        return None
    names = list(function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount])
    if len(names) < 3 or names[0] not in _MAPS or names[1] not in _STATES:
        return None
    tol, cap, mode = _first(names, _TOLERANCES), _first(names, _CAPS), _first(names, _MODES)
    if tol is None or cap is None:
        return None
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    others = tuple(name for name in required if name not in {names[0], names[1], tol, cap, mode})
    return {"f": names[0], "z0": names[1], "tol": tol, "cap": cap, "mode": mode, "absolute": False, "others": others}


# ---- trying a function out


class _Problem:
    """z -> 0.6 S z + b with S a cyclic shift of the last dimension: a contraction whose fixed point is known."""

    def __init__(self, dims: int, scale: float, dtype: torch.dtype) -> None:
        shape = (2, 3, 2, 2, 2, 2)[:dims]
        generator = torch.Generator().manual_seed(0)
        self.b = scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.z = torch.zeros_like(self.b)
        for _ in range(100):
            self.z = self.map(self.z)

    def map(self, z: Tensor) -> Tensor:
        return 0.6 * torch.roll(z, 1, -1) + self.b

    def residual(self, z: Tensor) -> float:
        with torch.no_grad():
            return float(torch.linalg.vector_norm(self.map(z) - z))


def _run(function: Callable[..., Any], facts: Mapping[str, Any], problem: _Problem, tol: float, cap: int = MOST) -> Any:
    given: dict[str, Any] = {facts["f"]: problem.map, facts["z0"]: torch.zeros_like(problem.b)}
    if facts["tol"] is not None:
        given[facts["tol"]] = tol
    if facts["cap"] is not None:
        given[facts["cap"]] = cap
    return function(**given, **dict(facts["others"]))


def _stopped_early(function: Callable[..., Any], facts: Mapping[str, Any], problem: _Problem, dims: int) -> tuple[list[Any], Any]:
    """What a solver returns that its cap stops, and for a smaller problem; nothing where it has no cap, or cannot be stopped."""
    if facts["cap"] is None:
        return [], None
    try:
        small = _run(function, facts, _Problem(dims, SMALLER, facts["dtype"]), _TIGHT * SMALLER, CAPS[1])
        return [_run(function, facts, problem, _TIGHT, cap) for cap in CAPS], small
    except Exception:  # whatever it does at a cap that is lower than it expects
        return [], None


def _try_out(function: Callable[..., Any], facts: dict[str, Any], dims: int, path: Any) -> Family | str | None:
    problem = _Problem(dims, 1.0, facts["dtype"])
    returned = _run(function, facts, problem, _TIGHT)
    early, small_run = _stopped_early(function, facts, problem, dims) if not isinstance(returned, Tensor) else ([], None)
    shape = _shape(returned, problem, path, early, small_run)
    if not _holds_z(shape):
        return None if path is None else f"{function.__name__} did not return the fixed point at {path!r}"
    unknown = _unknown(shape)
    if unknown:
        return f"{function.__name__} returns {unknown}, which is not known: name it with register_solver(..., result=function)"
    if facts["mode"] is None and facts["tol"] is not None and path is None:
        # the same problem ten thousand times smaller: an absolute tolerance is content at once
        small = _Problem(dims, 1e-4, facts["dtype"])
        z = _nearest(_run(function, facts, small, _LOOSE), small)
        facts = {**facts, "absolute": z is not None and small.residual(z) > 0.1 * float(small.z.norm())}
    whole = not facts["absolute"] and _tests_whole_batch(function, facts, dims)
    detached = _drops_gradients(function, facts, dims)
    facts = {name: value for name, value in facts.items() if name not in ("others", "dtype")}
    return Family(**facts, shape=shape, detached=detached, whole=whole)


def _tests_whole_batch(function: Callable[..., Any], facts: Mapping[str, Any], dims: int) -> bool:
    if facts["mode"] is not None or facts["tol"] is None:
        return False

    def solve(f: Callable[[Tensor], Tensor], z0: Tensor, tol: float) -> Tensor | None:
        given = {facts["f"]: f, facts["z0"]: z0, facts["tol"]: tol} | ({facts["cap"]: MOST} if facts["cap"] else {})
        found = [t for t in pytree.tree_leaves(function(**given, **dict(facts["others"]))) if isinstance(t, Tensor)]
        alike = [t for t in found if t.shape == z0.shape]
        return min(alike, key=lambda t: float((f(t) - t).norm()), default=None)

    try:
        return tests_whole_batch(solve, dims, facts["dtype"])
    except Exception:  # whatever it does with a problem of another size
        return False


def _drops_gradients(function: Callable[..., Any], facts: Mapping[str, Any], dims: int) -> bool:
    """Whether a solver's result has no gradient where its map has: it works under no_grad of its own."""
    problem = _Problem(dims, 1.0, facts["dtype"])
    problem.b.requires_grad_()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that are read from tensors with a history
            z = _nearest(_run(function, facts, problem, _LOOSE), problem)
    except Exception:  # one that cannot be differentiated says so to the user
        return False
    return z is not None and not z.requires_grad


def _is_z(value: Any, problem: _Problem) -> bool:
    # _TIGHT leaves about 1e-7 of z where the map contracts by 0.9, one in fp32 1e-6; no other field of a result is near
    return (
        isinstance(value, Tensor)
        and value.shape == problem.z.shape
        and bool(torch.allclose(value.double(), problem.z.double(), rtol=1e-5, atol=1e-6))
    )


def _nearest(returned: Any, problem: _Problem) -> Tensor | None:
    """The tensor in a result that is nearest to the fixed point."""
    found = [t for t in pytree.tree_leaves(returned) if isinstance(t, Tensor) and t.shape == problem.z.shape]
    return min(found, key=problem.residual, default=None)


def _shape(returned: Any, problem: _Problem, path: Any, early: Sequence[Any], small: Any) -> Any:
    """What is returned, part by part; `early` and `small` are what other runs returned (fields.py)."""
    if isinstance(returned, Tensor):
        return "z" if _is_z(returned, problem) else "? a tensor"
    if type(returned) is tuple:
        keys: list[Any] = list(range(len(returned)))
    elif type(returned) is dict:
        keys = list(returned)
    else:
        return f"? {type(returned).__name__}"
    alike = [_parts(run, returned) for run in (*early, small)]
    if any(run is None for run in alike[:-1]):
        alike = [alike[-1]]
    parts = []
    for key in keys:
        value = returned[key]
        if (path is None or key == path) and _is_z(value, problem):
            parts.append("z")
            continue
        others = [run[key] for run in alike[:-1] if run is not None]
        scaled = alike[-1][key] if alike[-1] is not None else None
        if type(value) is dict:
            parts.append(_shape(value, problem, object(), others, scaled))
        else:
            parts.append(field(str(key), value, others, scaled))
    if type(returned) is tuple:
        return ("tuple", *parts)
    return ("dict", *zip(keys, parts, strict=True))


def _parts(run: Any, like: Any) -> Any:
    """A run's result where it has the same parts as another; None otherwise."""
    same = type(run) is type(like) and len(run) == len(like)
    return run if same and (type(run) is tuple or list(run) == list(like)) else None


def _holds_z(shape: Any) -> bool:
    return shape == "z" or (isinstance(shape, tuple) and any(_holds_z(part) for part in _inner(shape)))


def _unknown(shape: Any) -> str:
    if isinstance(shape, str):
        return shape[2:] if shape.startswith("? ") else ""
    return next((found for part in _inner(shape) if (found := _unknown(part))), "")


def _inner(shape: tuple[Any, ...]) -> Sequence[Any]:
    """The parts of a tuple or dictionary."""
    if shape[0] == "tuple":
        return shape[1:]
    return [part for _, part in shape[1:]] if shape[0] == "dict" else ()
