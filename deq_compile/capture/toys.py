"""From Dynamo's variables to values for a trial run: the tensors of a small problem where they have a role in it."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from deq_compile import markers
from deq_compile.families.adjoints import Adjoint

from . import dynamo

Roles = Mapping[int, Any]  # id of a tensor's graph node -> a small tensor


class NoValue(Exception):
    """A variable stands for something that no trial can be given."""


def tensors_in(tx: Any, variable: Any, seen: set[int] | None = None) -> list[Any]:
    """The tensors among what a variable holds."""
    variable = _settled(tx, variable)
    seen = set() if seen is None else seen
    if id(variable) in seen:
        return []
    seen.add(id(variable))
    if isinstance(variable, dynamo.TensorVariable):
        return [variable]
    return [found for inner in _inside(tx, variable) for found in tensors_in(tx, inner, seen)]


def node_of(variable: Any) -> Any:
    return variable.as_proxy().node


def value_for(tx: Any, variable: Any, roles: Roles) -> Any:
    """A value for a trial.

    Raises:
        NoValue: there is none.
    """
    variable = _settled(tx, variable)
    if isinstance(variable, dynamo.TensorVariable):
        if id(node_of(variable)) not in roles:
            raise NoValue("a tensor without a role")
        return roles[id(node_of(variable))]
    items = variable.__dict__.get("items")
    if isinstance(items, list):
        made = [value_for(tx, item, roles) for item in items]
        kind: Callable[[Any], Any] = variable.python_type()
        return made if kind is list else tuple(made)
    if isinstance(items, dict):
        return {key.vt.as_python_constant(): value_for(tx, value, roles) for key, value in items.items()}
    if isinstance(variable, dynamo.SymNodeVariable):  # a number under dynamic=True: what it is now is guarded
        try:
            return dynamo.constant(tx, variable)
        except LookupError:
            raise NoValue("a number read from a tensor") from None
    if variable.is_python_constant():
        return variable.as_python_constant()
    if _code_of(variable) is not None:
        return function_for(tx, variable, roles)
    return _object_for(tx, variable, roles)


def _object_for(tx: Any, variable: Any, roles: Roles) -> Any:
    if "value" not in variable.__dict__:
        raise NoValue(type(variable).__name__)
    value = _of_its_own(variable.value, COPIED)
    for name, written in tx.output.side_effects.store_attr_mutations.get(variable, {}).items():
        object.__setattr__(value, name, value_for(tx, written, roles))
    return value


def _of_its_own(value: Any, depth: int) -> Any:
    """A copy that a trial may write to: of an object, its containers, what they hold, its buffers. Parameters are shared."""
    if isinstance(value, type | types.ModuleType | types.FunctionType | torch.nn.Parameter) or depth == 0:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | set | dict | collections.deque):
        found = copy.copy(value)
        pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        for key, inner in list(pairs):
            found[key] = _of_its_own(inner, depth - 1)  # type: ignore[index]
        return found
    if not hasattr(value, "__dict__"):
        return value
    found = copy.copy(value)
    for name, inner in vars(value).items():
        found.__dict__[name] = _of_its_own(inner, depth - 1)
    return found


COPIED = 3  # levels


def function_for(tx: Any, variable: Any, roles: Roles) -> Any:
    """A function like the one that a variable stands for, with the values of a trial in its closure."""
    fn = variable.__dict__.get("fn")
    closure = variable.__dict__.get("closure")
    if closure is None:
        if isinstance(fn, types.FunctionType):
            return fn
        raise NoValue(type(variable).__name__)
    code = variable.get_code()
    held = zip(code.co_freevars, getattr(closure, "items", closure) or (), strict=True)
    # one that calls itself holds itself
    cells = [types.CellType(value_for(tx, cell, roles)) if name != code.co_name else types.CellType() for name, cell in held]
    defaults = variable.__dict__.get("defaults")
    given = value_for(tx, defaults, roles) if defaults is not None else None
    return types.FunctionType(code, variable.get_globals(), code.co_name, given, tuple(cells))


def _code_of(variable: Any) -> Any:
    try:
        return variable.get_code() if hasattr(variable, "get_code") else None
    except NotImplementedError:
        return None


def _settled(tx: Any, variable: Any) -> Any:
    variable = variable.realize() if hasattr(variable, "realize") else variable
    if isinstance(variable, dynamo.CellVariable):
        variable = _settled(tx, tx.output.side_effects.load_cell(variable))
    return variable


def _inside(tx: Any, variable: Any) -> list[Any]:
    """What a container, a closure or an object made in this call holds."""
    items = variable.__dict__.get("items")
    if isinstance(items, list | dict):
        return list(items if isinstance(items, list) else items.values())
    closure = variable.__dict__.get("closure")
    if closure is not None:
        return list(getattr(closure, "items", closure) or ())
    return list(tx.output.side_effects.store_attr_mutations.get(variable, {}).values())


def step_in(tensors: Iterable[Any]) -> tuple[Any, Any] | None:
    """z0, given to autograd anew, and f(z0), where there is one of each."""
    tensors = list({id(node_of(t)): t for t in tensors}.values())
    starts = [t for t in tensors if node_of(t).target is markers.adjoint_input]
    images = [t for t in tensors if len(starts) == 1 and t is not starts[0] and depends_on(t, starts[0])]
    return (starts[0], images[0]) if len(images) == 1 else None


def hook_arguments(z: Any, f: Any, z0: Any, site: str, adjoint: Adjoint) -> tuple[Any, ...]:
    """What `markers.adjoint_hook` is called with."""
    return z.as_proxy(), f.as_proxy(), z0.as_proxy(), site, adjoint.tol, adjoint.terms or 0


def depends_on(variable: Any, other: Any) -> bool:
    """Whether a tensor is computed from another one."""
    return node_of(other) in _ancestors(node_of(variable), set())


def covered(variable: Any, sources: list[Any]) -> bool:
    """Whether every gradient of a tensor goes through one of some others."""
    stops = {node_of(source) for source in sources}
    reached = _ancestors(node_of(variable), stops) - stops
    values = (node.meta.get("example_value") for node in reached if node.op in ("placeholder", "get_attr"))
    return not any(getattr(value, "requires_grad", False) for value in values)


def _ancestors(node: Any, stops: set[Any]) -> set[Any]:
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        for a in current.all_input_nodes if current not in stops else ():
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return seen
