"""From Dynamo's variables to values for a trial run: the tensors of a small problem where they have a role in it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

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
    if variable.is_python_constant():
        return variable.as_python_constant()
    if _code_of(variable) is not None:
        return function_for(tx, variable, roles)
    return _object_for(tx, variable, roles)


def _object_for(tx: Any, variable: Any, roles: Roles) -> Any:
    if "value" not in variable.__dict__:
        raise NoValue(type(variable).__name__)
    value = copy.copy(variable.value)  # what the trial writes to it is not the user's
    for name, written in tx.output.side_effects.store_attr_mutations.get(variable, {}).items():
        object.__setattr__(value, name, value_for(tx, written, roles))
    return value


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
