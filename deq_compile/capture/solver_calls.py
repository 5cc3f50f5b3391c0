"""Calls of a solver, `solver(lambda z: f(z, x), z0, ...)`, as regions, at the tolerance and cap of the call.

The call returns what it always did, a tensor, a tuple or a dictionary, with the numbers of our solve in the fields that are
known. Lists of residuals hold the last one; Python numbers become tensors of one element.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deq_compile import markers
from deq_compile.families.solvers import Family, family_of, roles_of
from deq_compile.report import Location, Reason, Skipped
from deq_compile.solve_info import SolveInfo

from . import calls, dynamo


def install() -> Callable[[], None]:
    """Have calls looked at; returns what ends that."""
    calls.add(recognise)
    return lambda: calls.remove(recognise)


def recognise(tx: Any, function: Any, arguments: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    roles = roles_of(function)
    if roles is None:
        return None
    try:
        bound = inspect.signature(function).bind(*arguments, **kwargs).arguments
    except TypeError:  # the user's own mistake, to be told by Python
        return None
    given = _flatten(bound)
    state: Any = given.get(roles["z0"])
    state = state.realize() if hasattr(state, "realize") else state
    if not isinstance(state, dynamo.TensorVariable) or not isinstance(state.ndim, int):
        return None
    family = family_of(function, state.ndim)
    if not isinstance(family, Family):
        return None if family is None else Skipped(Reason.SOLVER, Location(), family)
    tol, cap = _number(tx, family.tol, given, function), _number(tx, family.cap, given, function)
    mode = _constant(tx, family.mode, given, function)
    if (tol is None and family.tol is not None) or mode not in (None, "rel", "abs"):
        return None  # a tolerance that is computed
    absolute = mode == "abs" if mode is not None else family.absolute
    form = f"call of {function.__name__}"
    facts = (form, tol, cap, absolute, family.detached, family.shape)
    own = [given[family.f], given[family.z0], *(dynamo.build(tx, v) for v in facts)]
    if family.build is None:
        return _adapter, own
    return _adapter_with_build, [*own, dynamo.build(tx, family.build)]


def _flatten(bound: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(bound)
    for value in list(bound.values()):
        if isinstance(value, dict):  # **kwargs of the solver
            given |= value
    return given


def _constant(tx: Any, name: str | None, given: Mapping[str, Any], function: Any) -> Any:
    """The value of an argument or its default; None where there is none that could be told."""
    if name is None:
        return None
    if name not in given:
        default = inspect.signature(function).parameters[name].default
        return None if default is inspect.Parameter.empty else default
    try:
        return dynamo.constant(tx, given[name])
    except LookupError:
        return None


def _number(tx: Any, name: str | None, given: Mapping[str, Any], function: Any) -> float | int | None:
    value = _constant(tx, name, given, function)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


# ---- traced by Dynamo from here on: a global number would become an input of the graph under dynamic=True


def _solve(site: Any, f: Any, z0: Any, form: Any, tol: Any, cap: Any, absolute: Any, detached: Any) -> Any:
    if absolute:
        # of the whole batch: a tolerance for each sample would have to know how many there are
        hints: Any = (("whole_batch_tol", tol), ("max_iter", cap))
    else:
        hints = (("tol", tol), ("stop_mode", "rel"), ("max_iter", cap))
    if detached:  # the function works without gradients, and so does what stands in for it
        with torch.no_grad():
            (z,), about = markers.region(lambda states: (f(states[0]),), (z0,), site, form, hints)
        return z.detach(), about.detach()
    (z,), about = markers.region(lambda states: (f(states[0]),), (z0,), site, form, hints)
    return z, about.detach()


def _adapter(site: Any, f: Any, z0: Any, *said: Any) -> Any:
    """`said`: form, tol, cap, absolute, detached, and the shape of what is returned."""
    _, tol, cap, absolute, _, shape = said
    z, about = _solve(site, f, z0, *said[:5])
    return z if shape == "z" else _build(shape, z, about, tol, cap, absolute)


def _adapter_with_build(site: Any, f: Any, z0: Any, *said: Any) -> Any:
    """`said`: as above, and the function that makes what is returned."""
    z, about = _solve(site, f, z0, *said[:5])
    return said[6](z, SolveInfo.of(about))


def _build(shape: Any, z: Any, about: Any, tol: Any, cap: Any, absolute: Any) -> Any:
    if isinstance(shape, str):
        return _fill(shape, z, about, tol, cap, absolute)
    if shape[0] == "tuple":
        return tuple([_build(part, z, about, tol, cap, absolute) for part in shape[1:]])
    return {key: _build(part, z, about, tol, cap, absolute) for key, part in shape[1:]}


def _fill(what: Any, z: Any, about: Any, tol: Any, cap: Any, absolute: Any) -> Any:
    if what == "z":
        return z
    if what == "tol":
        return tol
    if what == "cap":
        return cap
    if what == "none":
        return None
    if what == "false":
        return False
    if what == "iterations":
        return about[:, 1].max()
    norms = z.detach().reshape(about.shape[0], -1).norm(dim=1) + 1e-9  # |f(z)|, but for a residual
    size = torch.linalg.vector_norm(norms)
    lengths = about[:, 0] if absolute else about[:, 0] * norms
    whole = torch.linalg.vector_norm(lengths)
    number = whole if what.startswith("absolute") or (what.startswith("residual") and absolute) else whole / size
    return [number] if what.endswith("list") else number
