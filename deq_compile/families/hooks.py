"""Whether a backward hook solves the adjoint equation: read off its source.

    def backward_hook(grad):
        return solver(lambda y: autograd.grad(f0, z0, y, retain_graph=True)[0] + grad, ...)

or the same map iterated in a loop. What is looked for is the map w -> vjp(w) + grad, and that its fixed point is what the
hook returns; which solver is called with it, and with what tolerance, is resolved by the caller.
"""

from __future__ import annotations

import ast
import functools
import linecache
import types
from dataclasses import dataclass


@dataclass(frozen=True)
class AdjointHook:
    """The parts of a hook.

    f, z    names of the tensors in `grad(f, z, w)`
    solver  the expression that is called with the map; None where a loop iterates it
    keywords  of that call: (name, expression), None for a `**` expression
    loop_tol  the smallest constant that a test in the loop compares with
    """

    f: str
    z: str
    solver: ast.expr | None
    keywords: tuple[tuple[str | None, ast.expr], ...]
    positional: tuple[ast.expr, ...]
    loop_tol: float | None


@functools.lru_cache(maxsize=256)
def read_hook(code: types.CodeType) -> AdjointHook | None:
    """The adjoint solve in a function of one argument; None for any other function."""
    node = _definition(code)
    if node is None or len(node.args.args) != 1 or node.args.vararg or node.args.kwonlyargs:
        return None
    cotangent = node.args.args[0].arg
    body: list[ast.stmt] = node.body if isinstance(node.body, list) else [ast.Return(node.body)]
    found = [part for statement in body for part in ast.walk(statement) if (_map(part, cotangent)) is not None]
    if len(found) != 1:
        return None
    parts = _map(found[0], cotangent)
    assert parts is not None
    f, z, w = parts
    return _through_solver(body, found[0], f, z, w) or _through_loop(body, found[0], f, z, w)


def _definition(code: types.CodeType) -> ast.FunctionDef | ast.Lambda | None:
    source = "".join(linecache.getlines(code.co_filename))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    wanted = ast.Lambda if code.co_name == "<lambda>" else ast.FunctionDef
    found = [node for node in ast.walk(tree) if isinstance(node, wanted) and code.co_firstlineno in _first_lines(node)]
    return found[0] if len(found) == 1 and getattr(found[0], "name", code.co_name) == code.co_name else None


def _first_lines(node: ast.FunctionDef | ast.Lambda) -> list[int]:
    """Where a function may begin: a decorator counts as its first line."""
    return [node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]


def _map(node: ast.AST, cotangent: str) -> tuple[str, str, str] | None:
    """(f, z, w) of `grad(f, z, w)[0] + cotangent`, either way around."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return None
    for product, other in ((node.left, node.right), (node.right, node.left)):
        if isinstance(other, ast.Name) and other.id == cotangent and isinstance(product, ast.Subscript):
            call = product.value
            first = isinstance(product.slice, ast.Constant) and product.slice.value == 0
            if first and isinstance(call, ast.Call) and _last(call.func) == "grad":
                named = {keyword.arg: keyword.value for keyword in call.keywords}
                arguments = [*call.args, *(named[n] for n in ("outputs", "inputs", "grad_outputs") if n in named)]
                names = [a.id for a in arguments if isinstance(a, ast.Name)]
                if len(names) == len(arguments) == 3:
                    return names[0], names[1], names[2]
    return None


def _last(expression: ast.expr) -> str:
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


def _through_solver(body: list[ast.stmt], map_: ast.AST, f: str, z: str, w: str) -> AdjointHook | None:
    for statement in body:
        for call in ast.walk(statement):
            if not isinstance(call, ast.Call) or not call.args or not isinstance(call.args[0], ast.Lambda):
                continue
            function = call.args[0]
            if function.body is not map_ or [a.arg for a in function.args.args] != [w]:
                continue
            if not _returned(body, call):
                return None
            keywords = tuple((keyword.arg, keyword.value) for keyword in call.keywords)
            return AdjointHook(f, z, call.func, keywords, tuple(call.args[1:]), None)
    return None


def _returned(body: list[ast.stmt], call: ast.Call) -> bool:
    """Whether every return of the hook gives back what `call` returned, or a part of it."""
    names: set[str] = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign) and _part_of(node.value, call, names):
                targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
    returns = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Return)]
    return bool(returns) and all(r.value is not None and _part_of(r.value, call, names) for r in returns)


def _part_of(value: ast.expr, call: ast.Call, names: set[str]) -> bool:
    while isinstance(value, ast.Subscript):
        value = value.value
    return value is call or (isinstance(value, ast.Name) and value.id in names)


def _through_loop(body: list[ast.stmt], map_: ast.AST, f: str, z: str, w: str) -> AdjointHook | None:
    """`w = grad(f, z, w)[0] + q` in a loop, possibly through a second name, and w returned."""
    loops = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.For | ast.While)]
    loops = [loop for loop in loops if any(part is map_ for part in ast.walk(loop))]
    if len(loops) != 1:
        return None
    assigned = [
        node for node in ast.walk(loops[0]) if isinstance(node, ast.Assign) and len(node.targets) == 1 and
        isinstance(node.targets[0], ast.Name)
    ]  # fmt: skip
    new = next((node.targets[0].id for node in assigned if node.value is map_), None)  # type: ignore[attr-defined]
    carried = {w} if new == w else {w, new}
    moves = [node for node in assigned if isinstance(node.value, ast.Name) and node.value.id == new]
    if new is None or (new != w and not any(node.targets[0].id == w for node in moves)):  # type: ignore[attr-defined]
        return None
    if any(node.targets[0].id in carried and node.value is not map_ and node not in moves for node in assigned):  # type: ignore[attr-defined]
        return None
    returns = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Return)]
    if not returns or not all(isinstance(r.value, ast.Name) and r.value.id in carried for r in returns):
        return None
    constants = [
        float(c.value) for node in ast.walk(loops[0]) if isinstance(node, ast.Compare) for c in node.comparators
        if isinstance(c, ast.Constant) and isinstance(c.value, float) and 0 < c.value < 0.5
    ]  # fmt: skip
    return AdjointHook(f, z, None, (), (), min(constants, default=None))
