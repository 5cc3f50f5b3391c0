"""`fixed_point(f, z0)`: the fixed point said outright, in eager mode and under the compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .capture import calls, marker
from .config import Options
from .region.eager import solve_eagerly
from .region.surroundings import NO_TANGENT, NotHere, any_tangent, plain, values_are_known

S = TypeVar("S")


def fixed_point(f: Callable[[S], S], z0: S, /, **options: Any) -> S:
    """The fixed point z* = f(z*), found from z0 by the solver of the compiler, with the implicit gradient.

    Works in plain eager mode. Inside a model compiled with this backend it becomes a region of the whole graph; another
    backend breaks its graph here. Gradients flow to everything that `f` reads: parameters, closures, tensors it captured.
    The initial state has gradient zero.

    Args:
        f: maps a state to a state of the same structure, shapes and dtypes. It is called many times, so it should neither
            draw random numbers nor write to anything.
        z0: a tensor, or a pytree of tensors (lists, tuples, dicts, named tuples, registered dataclasses), real floating point.
            Where all of them have one size in dimension 0, that is taken for a batch if f keeps its rows apart (`batch`).
        options: as in `deq_compile.config.Options`; those that speak of loops (`min_repeats`, `semantics`, `verify`, ...)
            mean nothing here, nor does `inner` in eager mode.

    Returns:
        The iterate of smallest residual, in the structure of z0. A sample that missed the tolerance says so in a
        `RegionWarning` and in `record_solves`.

    Raises:
        ValueError: an unknown option or bad value, or an f that changes structure, shape, dtype or device of its argument.
        TypeError: a state that is no tensor, not real floating point, or a wrapper of other tensors (DTensor, ...); an f that
            cannot be called.
        RuntimeError: a double backward, forward-mode AD, a torch.func transform or a tracer around it. Under fake and meta
            tensors f is evaluated once, for shapes.
    """
    if torch.compiler.is_dynamo_compiling():  # not by our backend, or where it found no region: outside of the graph
        return _outside(f, z0, options)
    return _eager(f, z0, options)


def _eager(f: Callable[[S], S], z0: S, options: dict[str, Any]) -> S:
    config = Options.from_options(options).resolve()
    _check_callable(f)
    leaves, structure = pytree.tree_flatten(z0)
    known = values_are_known([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    _check_state(leaves)

    def body(states: list[Tensor]) -> list[Tensor]:
        out = f(pytree.tree_unflatten(states, structure))
        results, made = pytree.tree_flatten(out)
        _check_result(leaves, structure, results, made)
        return results

    if not known:
        return pytree.tree_unflatten(body([leaf.detach() for leaf in leaves]), structure)
    if forward_ad._current_level >= 0 and any_tangent([*leaves, *body([leaf.detach() for leaf in leaves])]):
        raise NotHere(NO_TANGENT)
    found = solve_eagerly(body, leaves, config, key=getattr(f, "__code__", type(f)), where=_caller())
    return pytree.tree_unflatten(found, structure)


_outside = torch._dynamo.disable(
    _eager, reason="deq_compile.fixed_point: only backend='deq' makes it a part of the graph; elsewhere it is solved outside"
)


def _check_callable(f: Any) -> None:
    if not callable(f):
        raise TypeError(f"fixed_point: expected f to be a function of the state, got {type(f).__name__}. Fix: fixed_point(f, z0)")


def _check_state(leaves: list[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            what = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"fixed_point: expected z0 of real floating-point tensors, got {what}")
        if not plain(leaf):
            what = type(leaf).__name__ if leaf.layout is torch.strided else str(leaf.layout)
            raise TypeError(
                f"fixed_point: expected z0 of plain dense tensors, got {what}. Fix: solve on its parts (to_local() of a DTensor, "
                "values() of a nested tensor)"
            )
    if not leaves:
        raise TypeError("fixed_point: expected z0 of at least one tensor, got an empty structure")


def _check_result(leaves: list[Tensor], structure: Any, results: list[Any], made: Any) -> None:
    if made != structure:
        raise ValueError(f"fixed_point: expected f to return the structure of z0, {structure}, got {made}")
    for before, after in zip(leaves, results, strict=True):
        same = isinstance(after, Tensor) and after.shape == before.shape and after.device == before.device and plain(after)
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
    while frame.f_back is not None and (frame.f_code.co_filename.startswith((marker.PACKAGE, _TORCH))):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_TORCH = torch.__path__[0]


def _traced(site: str, f: Any, z0: Any, **options: Any) -> Any:
    """What Dynamo traces in place of `fixed_point` for our backend."""
    pairs = tuple((name, value) for name, value in options.items())
    _check_callable(f)
    if isinstance(z0, Tensor):

        def single(states: tuple[Tensor, ...]) -> Any:
            out = f(states[0])
            if not isinstance(out, Tensor):
                what = f"a {type(out).__name__}" if out is not None else "None"
                raise ValueError("fixed_point: expected f to return a tensor like z0, got " + what)
            return (out,)

        (found,), _ = marker.region(single, (z0,), site, "fixed_point", (), pairs)
        return found
    leaves, structure = pytree.tree_flatten(z0)

    def body(states: tuple[Tensor, ...]) -> Any:
        results, made = pytree.tree_flatten(f(pytree.tree_unflatten(list(states), structure)))
        if made != structure:
            raise ValueError(f"fixed_point: expected f to return the structure of z0, {structure}, got {made}")
        return results

    states, _ = marker.region(body, tuple(leaves), site, "fixed_point", (), pairs)
    return pytree.tree_unflatten(list(states), structure)


calls.take(fixed_point, _traced)
