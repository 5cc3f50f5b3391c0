"""`fixed_point(f, z0)`: the fixed point said outright, in eager mode and under the compiler."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from .config import Options
from .region.backward import of_steps
from .region.eager import region_of, solve_eagerly
from .region.functional import solve_in_transform
from .region.steps import refuse_transform
from .region.surroundings import NotHere, inside_transform, plain, values_are_known
from .solve_info import COLUMNS, SolveInfo
from .structure import Structure, flatten, unflatten
from .torch_parts import AGAIN, graph_task, lost

S = TypeVar("S")


@overload
def fixed_point(
    f: Callable[[S], S], z0: S, /, *, return_info: Literal[False] = ..., derivatives: int = ..., **options: Any
) -> S: ...
@overload
def fixed_point(
    f: Callable[[S], S], z0: S, /, *, return_info: Literal[True], derivatives: int = ..., **options: Any
) -> tuple[S, SolveInfo]: ...
def fixed_point(
    f: Callable[[S], S], z0: S, /, *, return_info: bool = False, derivatives: int = 1, **options: Any
) -> S | tuple[S, SolveInfo]:
    """The fixed point z* = f(z*), found from z0 by the solver of the compiler, with the implicit gradient.

    Works in plain eager mode. Inside a model compiled with this backend it becomes a region of the whole graph; another
    backend breaks its graph here. Gradients flow to everything that `f` reads: parameters, closures, tensors it captured.
    The initial state has gradient zero, but with `solver="reversible"`, whose own steps are differentiated. In eager mode it may
    stand inside of `torch.func` transforms (vmap, grad, jacrev, jacfwd, jvp, hessian), in any order and depth; the samples of
    vmap are the rows of one solve.

    Args:
        f: maps a state to a state of the same structure, shapes and dtypes. It is called many times, so it should neither
            draw random numbers nor write to anything.
        z0: a tensor, or a pytree of tensors (lists, tuples, dicts, named tuples, dataclasses), real floating point. Where all of
            them have one size in dimension 0, that is taken for a batch if f keeps its rows apart (`batch`).
        return_info: whether to return what the solve came to as well.
        derivatives: how many times the result can be differentiated, by the implicit gradient each time: 2 for Hessians, gradient
            penalties and forces in a loss. Each beyond the first costs one more evaluation of f. Not in a compiled model, where
            the call is left outside of the graph. Derivatives by torch.func need no such number.
        options: as in `deq_compile.config.Options`; those that speak of loops (`min_repeats`, `semantics`, `verify`, ...)
            mean nothing here, nor does `inner` in eager mode.

    Returns:
        The iterate of smallest residual, in the structure of z0; with ``return_info`` that and a :class:`SolveInfo` of (B,)
        tensors: residual, iterations, converged. B is the size of dimension 0 of the first tensor, or 1. A sample that missed
        the tolerance says so in a `RegionWarning` and in `record_solves` too.

    Raises:
        ValueError: an unknown option or bad value, or an f that changes structure, shape, dtype or device of its argument.
        TypeError: a state that is no tensor, not real floating point, or a wrapper of other tensors (DTensor, ...); an f that
            cannot be called.
        RuntimeError: one backward more than `derivatives`, or through a tangent of forward-mode AD by `dual_level` (which
            itself is right, of first order); a tracer around it; inside of a torch.func transform an f that is not made of
            torch's functions. Under fake and meta tensors f is evaluated once, for shapes.
    """
    if torch.compiler.is_dynamo_compiling():  # not by our backend, or where it found no region: outside of the graph
        return outside(f, z0, return_info, derivatives, options)
    if torch.compiler.is_exporting():
        return _exported(f, z0, return_info, derivatives, options)
    return _eager(f, z0, return_info, derivatives, options)


def _eager(f: Callable[[S], S], z0: S, return_info: bool, derivatives: int, options: dict[str, Any]) -> Any:
    check_flag(return_info)
    _check_derivatives(derivatives)
    config = Options.from_options(options).resolve()
    check_callable(f)
    leaves, structure = flatten(z0)
    known = values_are_known([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    transformed = inside_transform()
    _check_state(leaves, wrapped=transformed)

    def body(states: list[Tensor]) -> list[Tensor]:
        results, made = flatten(f(unflatten(states, structure)))
        _check_result(states if transformed else leaves, structure, results, made, wrapped=transformed)
        return results

    rows = leaves[0].shape[0] if leaves[0].dim() else 1
    if not known:
        once = unflatten(body([leaf.detach() for leaf in leaves]), structure)
        return (once, SolveInfo.of(leaves[0].new_zeros((rows, COLUMNS), dtype=torch.float32))) if return_info else once
    key, where = getattr(f, "__code__", type(f)), _caller()
    if transformed:
        if of_steps(config):
            refuse_transform(where)
        states, info = solve_in_transform(body, leaves, functools.partial(region_of, key, config, where))
        solved = unflatten(states, structure)
        return (solved, SolveInfo.of(info)) if return_info else solved
    found = solve_eagerly(body, leaves, config, key=key, where=where, derivatives=derivatives)
    solved = unflatten(found.states, structure)
    return (solved, SolveInfo.of(found.result.solve_info().expand(rows, -1))) if return_info else solved


_WHY = (
    "deq_compile.fixed_point: only backend='deq' makes it a part of the graph; elsewhere it is solved outside. "
    "Fix for torch.export: strict=False"
)
_disabled: Callable[..., Any] | None = None  # once Dynamo is there


def prepare() -> None:
    """Make what `outside` calls, now that Dynamo is there: within a trace torch 2.14 refuses to."""
    global _disabled
    if _disabled is None:  # Dynamo may trace this: torch 2.11 warns of a list's `append`
        _disabled = torch.compiler.disable(_eager, reason=_WHY)


def outside(*given: Any) -> Any:
    """`_eager`, outside of the graph of whoever traces."""
    if _disabled is None:
        prepare()
    assert _disabled is not None
    return _disabled(*given)


if "torch._dynamo" in sys.modules:
    prepare()


def _exported(*given: Any) -> Any:
    """`fixed_point` while an export traces: a loop of the exported program, where this torch has the parts for it."""
    from .exporting import exporting, traced

    if not exporting():
        return _eager(*given)
    f, z0, return_info, derivatives, options = given

    def call(z0: Any) -> Any:
        return fixed_point(f, z0, return_info=return_info, derivatives=derivatives, **options)

    return traced(call, Options())(z0)


def check_flag(return_info: Any) -> None:
    if not isinstance(return_info, bool):
        raise TypeError(f"fixed_point: expected return_info to be True or False, got {return_info!r}")


def _check_derivatives(derivatives: Any) -> None:
    if isinstance(derivatives, bool) or not isinstance(derivatives, int) or derivatives < 1:
        raise ValueError(f"fixed_point: expected derivatives to be an integer of at least 1, got {derivatives!r}")
    if derivatives > 1 and graph_task is None:
        raise NotHere(f"fixed_point: derivatives={derivatives} is not possible, {lost()[AGAIN]}. Fix: derivatives=1")


def check_callable(f: Any) -> None:
    if not callable(f):
        raise TypeError(f"fixed_point: expected f to be a function of the state, got {type(f).__name__}. Fix: fixed_point(f, z0)")


def _check_state(leaves: list[Any], wrapped: bool = False) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            what = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"fixed_point: expected z0 of real floating-point tensors, got {what}")
        if not (plain(leaf) or wrapped):
            what = type(leaf).__name__ if leaf.layout is torch.strided else str(leaf.layout)
            raise TypeError(
                f"fixed_point: expected z0 of plain dense tensors, got {what}. Fix: solve on its parts (to_local() of a DTensor, "
                "values() of a nested tensor)"
            )
    if not leaves:
        raise TypeError("fixed_point: expected z0 of at least one tensor, got an empty structure")


def _check_result(leaves: list[Tensor], structure: Structure, results: list[Any], made: Structure, wrapped: bool = False) -> None:
    if made != structure:
        raise ValueError(f"fixed_point: expected f to return the structure of z0, {structure}, got {made}")
    for before, after in zip(leaves, results, strict=True):
        same = isinstance(after, Tensor) and after.shape == before.shape and after.device == before.device
        same = same and (wrapped or plain(after))
        if not same or (after.dtype != before.dtype and not torch.is_autocast_enabled(before.device.type)):
            raise ValueError(
                f"fixed_point: expected f to keep shape, dtype and device of its state, {_described(before)}, "
                f"got {_described(after)}"
            )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = "" if plain(value) else f" ({type(value).__name__}, {value.layout})"
    return f"{tuple(value.shape)} in {value.dtype} on {value.device}{kind}"


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename.startswith((_PACKAGE, _TORCH))):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_TORCH, _PACKAGE = torch.__path__[0], os.path.dirname(os.path.abspath(__file__))
