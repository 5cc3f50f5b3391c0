"""How `deq_compile.fixed_point` is traced: as a region of the whole graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deq_compile import markers
from deq_compile.explicit import check_callable, check_flag, fixed_point, outside
from deq_compile.solve_info import SolveInfo
from deq_compile.structure import flatten, unflatten

from . import calls


def _traced(site: str, f: Any, z0: Any, return_info: bool = False, derivatives: int = 1, **options: Any) -> Any:
    """What Dynamo traces in place of `fixed_point` for our backend."""
    if derivatives != 1:  # torch refuses a second backward through a compiled graph
        return outside(f, z0, return_info, derivatives, options)
    check_flag(return_info)
    pairs = tuple((name, value) for name, value in options.items())
    check_callable(f)
    if isinstance(z0, Tensor):

        def single(states: tuple[Tensor, ...]) -> Any:
            out = f(states[0])
            if not isinstance(out, Tensor):
                what = f"a {type(out).__name__}" if out is not None else "None"
                raise ValueError("fixed_point: expected f to return a tensor like z0, got " + what)
            return (out,)

        (found,), about = markers.region(single, (z0,), site, "fixed_point", (), pairs)
        return (found, SolveInfo.of(about.detach())) if return_info else found
    leaves, structure = flatten(z0)

    def body(states: tuple[Tensor, ...]) -> Any:
        results, made = flatten(f(unflatten(list(states), structure)))
        if made != structure:
            raise ValueError(f"fixed_point: expected f to return the structure of z0, {structure}, got {made}")
        return results

    states, about = markers.region(body, tuple(leaves), site, "fixed_point", (), pairs)
    solved = unflatten(list(states), structure)
    return (solved, SolveInfo.of(about.detach())) if return_info else solved


def install() -> None:
    """Take calls of `fixed_point` where our backend traces."""
    calls.take(fixed_point, _traced)
