"""Backward hooks that solve the adjoint equation, taken over while Dynamo traces `z.register_hook(hook)`.

A hook that is recognised is not installed. An `adjoint_hook` in the graph says which step it differentiates; a pass then
makes that step the body of the region before it, whose own backward solves the same equation. Where no pass does, Dynamo
traces the frame again, and the hook stays. `x.requires_grad_()` on a tensor made in the graph, which the hooks need for
their vector-Jacobian products, becomes a marker too: torch 2.11 refuses it, torch 2.13 leaves a write in the graph.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from deq_compile import markers
from deq_compile.families.adjoints import Adjoint, Toy, kind_of
from deq_compile.families.hooks import AdjointHook, read_hook
from deq_compile.families.solvers import Family, family_of
from deq_compile.report import Reason, Skipped

from . import dynamo, sites, toys

COUNT_ONLY_TOL = 1e-4  # where the hook's solve has a count and no tolerance


def install() -> Callable[[], None]:
    """Patch Dynamo; returns what takes the patches out again."""
    register_hook, requires_grad_ = dynamo.tensor_method("register_hook"), dynamo.tensor_method("requires_grad_")

    @functools.wraps(register_hook)
    def patched_register_hook(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.source and len(args) == 1 and not kwargs and sites.ours(tx):
            with sites.guarded(tx, "looking at a backward hook"):
                handle = _take(self, tx, args[0])
            if handle is not None:
                return handle
        return register_hook(self, tx, *args, **kwargs)

    @functools.wraps(requires_grad_)
    def patched_requires_grad_(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.source and _means_true(args, kwargs) and sites.ours(tx):
            with sites.guarded(tx, "tracing requires_grad_()"):
                site = sites.site_of(tx, "requires_grad_")
                if not sites.blocked(tx, site) and not self.as_proxy().node.meta["example_value"].requires_grad:
                    _replace(self, tx, markers.adjoint_input, (self.as_proxy(), site))
                    return self
        return requires_grad_(self, tx, *args, **kwargs)

    restore = [
        dynamo.trace_tensor_method("register_hook", patched_register_hook),
        dynamo.trace_tensor_method("requires_grad_", patched_requires_grad_),
    ]

    def remove() -> None:
        for back in restore:
            back()

    return remove


def _replace(variable: Any, tx: Any, function: Any, args: tuple[Any, ...]) -> None:
    """Let a tensor variable stand for `function(*args)` from here on."""
    proxy = tx.output.create_proxy("call_function", function, args, {})
    variable.proxy = dynamo.wrap_fx_proxy(tx, proxy).as_proxy()
    variable.synchronize_attributes(tx)


def _take(variable: Any, tx: Any, hook: Any) -> Any:
    """A handle of a hook that is never called; None where the hook stays."""
    site = sites.site_of(tx, "register_hook")
    if sites.blocked(tx, site):
        return None
    hook = hook.realize() if hasattr(hook, "realize") else hook
    code = hook.get_code() if hasattr(hook, "get_code") else None
    found = read_hook(code) if code is not None else None
    read = _as_read(tx, hook, found) if found is not None else None
    tried = read or _as_tried(tx, hook)
    if not isinstance(tried, tuple):
        if tried is not None or found is not None:
            detail = tried or "the solver that the hook calls, or its tolerance, is not known"
            sites.refuse(tx, site, Skipped(Reason.HOOK, sites.location(tx), detail))
        return None
    f, z0, adjoint = tried
    _replace(variable, tx, markers.adjoint_hook, toys.hook_arguments(variable, f, z0, site, adjoint))
    return dynamo.removed_handle()


def _means_true(args: Any, kwargs: Any) -> bool:
    """Whether the arguments of `requires_grad_` say what it means without any."""
    given = [*args, *kwargs.values()]
    return not given or (len(given) == 1 and given[0].is_python_constant() and given[0].as_python_constant() is True)


def _as_read(tx: Any, hook: Any, found: AdjointHook) -> tuple[Any, Any, Adjoint] | None:
    """f(z0), z0 and what becomes of a cotangent, read off the source; None where the solver or its tolerance is not known."""
    names = _Names(tx, hook)
    f, z0 = names.variable(found.f), names.variable(found.z)
    tol = _tolerance(found, names)
    if tol is None or not all(isinstance(v, dynamo.TensorVariable) for v in (f, z0)):
        return None
    return f, z0, Adjoint(tol)


def _as_tried(tx: Any, hook: Any) -> tuple[Any, Any, Adjoint] | str | None:
    """The same, by running the hook on a small problem; a text where it is an adjoint with something more to it."""
    step = toys.step_in(toys.tensors_in(tx, hook))
    if step is None:
        return None
    z0, f = step

    def run(toy: Toy, q: torch.Tensor) -> torch.Tensor | None:
        roles = {id(toys.node_of(z0)): toy.z0, id(toys.node_of(f)): toy.f}
        w = toys.function_for(tx, hook, roles)(q)
        return w if isinstance(w, torch.Tensor) else None

    adjoint = kind_of(run, z0.ndim, 1)
    return (f, z0, adjoint) if isinstance(adjoint, Adjoint) else adjoint


class _Names:
    """What the names in a hook stand for: its closure, then the globals of its file."""

    def __init__(self, tx: Any, hook: Any) -> None:
        self.tx = tx
        cells = getattr(hook, "closure", None)
        items = getattr(cells, "items", cells) or ()
        self.cells = dict(zip(hook.get_code().co_freevars, items, strict=False))
        self.globals = hook.get_globals() if hasattr(hook, "get_globals") else {}

    def variable(self, name: str) -> Any:
        """Dynamo's variable for a captured name; None where there is none."""
        cell = self.cells.get(name)
        if cell is None:
            return None
        if isinstance(cell, dynamo.CellVariable):
            cell = self.tx.output.side_effects.load_cell(cell)
        return cell.realize() if hasattr(cell, "realize") else cell

    def value(self, expression: ast.expr) -> Any:
        """The Python value of an expression.

        Raises:
            LookupError: it is none that could be told.
        """
        if isinstance(expression, ast.Constant):
            return expression.value
        if isinstance(expression, ast.Name):
            variable = self.variable(expression.id)
            if variable is None:
                return self.globals[expression.id]
            return _python(variable)
        if isinstance(expression, ast.Attribute):
            return getattr(self.value(expression.value), expression.attr)
        raise LookupError(ast.dump(expression))


def _python(variable: Any) -> Any:
    for attribute in ("fn", "value"):  # a function; a module or object
        if attribute in variable.__dict__:
            return variable.__dict__[attribute]
    if variable.is_python_constant():
        return variable.as_python_constant()
    items = variable.__dict__.get("items")
    if isinstance(items, dict):
        return {key.vt.as_python_constant(): value.realize().as_python_constant() for key, value in items.items()}
    raise LookupError(type(variable).__name__)


def _tolerance(hook: AdjointHook, names: _Names) -> float | None:
    """The tolerance at which a hook solves; None where its solver or tolerance is not known."""
    if hook.solver is None:
        return hook.loop_tol or COUNT_ONLY_TOL
    try:
        function = names.value(hook.solver)
        family = next((found for dims in (2, 3, 4) if isinstance(found := family_of(function, dims), Family)), None)
        if family is None:
            return None
        given = dict(zip(list(inspect.signature(function).parameters)[1:], (None for _ in hook.positional), strict=False))
        for name, expression in hook.keywords:
            if name is None:
                given |= names.value(expression)
            elif name == family.tol:
                given[name] = names.value(expression)
        if family.tol is None:
            return COUNT_ONLY_TOL
        if family.tol in given:
            tol = given[family.tol]
        else:
            tol = inspect.signature(function).parameters[family.tol].default
    except (LookupError, AttributeError, TypeError, ValueError):
        return None
    return float(tol) if isinstance(tol, int | float) and tol > 0 else None
