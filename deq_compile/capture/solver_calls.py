"""Calls of a solver, `solver(lambda z: f(z, x), z0, ...)`, as regions, at the tolerance and cap of the call.

The call returns what it always did, a tensor, a tuple or a dictionary, with the numbers of our solve in the fields that are
known. Lists of residuals hold the last one. A tensor that no solve of ours has may be returned, and must not be used.
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
    others = _others(tx, roles["others"], given)
    family = family_of(function, state.ndim, others) if others is not None else None
    if not isinstance(family, Family):
        return None if family is None else Skipped(Reason.SOLVER, Location(), family)
    tol, cap = _number(tx, family.tol, given, function), _number(tx, family.cap, given, function)
    mode = _constant(tx, family.mode, given, function)
    if (tol is None and family.tol is not None) or mode not in (None, "rel", "abs"):
        return None  # a tolerance that is computed
    absolute = mode == "abs" if mode is not None else family.absolute
    rule = "absolute" if absolute else "whole" if family.whole and mode is None else "samples"
    form = f"call of {function.__name__}"
    facts = (form, tol, cap, rule, family.detached, family.shape)
    own = [given[family.f], given[family.z0], *(dynamo.build(tx, v) for v in facts)]
    if family.build is None:
        return _adapter, own
    return _adapter_with_build, [*own, dynamo.build(tx, family.build)]


def _others(tx: Any, names: Sequence[str], given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """The arguments that a call has to give and that have no role; None where one of them is no plain constant."""
    try:
        values = tuple((name, dynamo.constant(tx, given[name])) for name in names)
    except LookupError:
        return None
    return values if all(isinstance(v, int | float | str | bool | None) for _, v in values) else None


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


def _start(f: Any, z0: Any, detached: Any) -> Any:
    """The initial state in the dtype of the map's results, which autocast may have chosen: then one step further."""
    if not torch.is_autocast_enabled(z0.device.type):
        return z0
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
        first = f(z0)
    return z0 if first.dtype == z0.dtype else first


def _solve(site: Any, f: Any, z0: Any, form: Any, tol: Any, cap: Any, rule: Any, detached: Any) -> Any:
    z0 = _start(f, z0, detached)
    if rule == "absolute":
        # of the whole batch: a tolerance for each sample would have to know how many there are
        hints: Any = (("whole_batch_tol", tol), ("max_iter", cap))
    else:
        hints = (("tol", tol), ("stop_mode", "rel"), ("max_iter", cap))
        if rule == "whole" and z0.device.type == "cpu":  # a device would have to be asked in every iteration
            hints = (*hints, ("whole_batch_relative_tol", tol))
    if detached:  # the function works without gradients, and so does what stands in for it
        with torch.no_grad():
            (z,), about = markers.region(lambda states: (f(states[0]),), (z0,), site, form, hints)
        return z.detach(), about.detach()
    (z,), about = markers.region(lambda states: (f(states[0]),), (z0,), site, form, hints)
    return z, about.detach()


def _adapter(site: Any, f: Any, z0: Any, *said: Any) -> Any:
    """`said`: form, tol, cap, what the tolerance is of, detached, and the shape of what is returned."""
    _, tol, cap, rule, _, shape = said
    z, about = _solve(site, f, z0, *said[:5])
    return z if shape == "z" else _build(shape, z, _About(about, site, tol, cap, rule == "absolute"))


def _adapter_with_build(site: Any, f: Any, z0: Any, *said: Any) -> Any:
    """`said`: as above, and the function that makes what is returned."""
    z, about = _solve(site, f, z0, *said[:5])
    return said[6](z, SolveInfo.of(about))


class _About:
    """What is known of a solve when its result is built."""

    def __init__(self, rows: Any, site: Any, tol: Any, cap: Any, absolute: Any) -> None:
        self.rows, self.site, self.tol, self.cap, self.absolute = rows, site, tol, cap, absolute


def _build(shape: Any, z: Any, about: Any) -> Any:
    if isinstance(shape, str):
        return _fill(shape, z, about)
    if shape[0] == "constant":
        return shape[1]
    if shape[0] == "count":
        return about.rows[:, 1].max().to(torch.int64).item() + shape[1]
    if shape[0] == "tuple":
        return tuple([_build(part, z, about) for part in shape[1:]])
    return {key: _build(part, z, about) for key, part in shape[1:]}


def _fill(what: Any, z: Any, about: Any) -> Any:
    fixed = {"z": z, "tol": about.tol, "cap": about.cap, "none": None, "false": False}
    if what in fixed:
        return fixed[what]
    if what == "untold":
        return markers.untold(z.detach(), about.rows[:, 1].max().to(torch.int64).item(), about.site)
    if what == "iterations":
        return about.rows[:, 1].max()
    if what == "iterations number":
        return about.rows[:, 1].max().to(torch.int64).item()
    if what in ("converged", "missed"):
        missed = (~SolveInfo.of(about.rows).converged).sum().item()
        return missed == 0 if what == "converged" else missed > 0
    return _residual(what, z, about)


def _residual(what: Any, z: Any, about: Any) -> Any:
    norms = z.detach().reshape(about.rows.shape[0], -1).norm(dim=1) + 1e-9  # |f(z)|, but for a residual
    size = torch.linalg.vector_norm(norms)
    lengths = about.rows[:, 0] if about.absolute else about.rows[:, 0] * norms
    whole = torch.linalg.vector_norm(lengths)
    number = whole if what.startswith("absolute") or (what.startswith("residual") and about.absolute) else whole / size
    if what.endswith("number"):
        return number.item()
    if what.endswith("floats"):
        return [number.item()]
    return [number] if what.endswith("list") else number
