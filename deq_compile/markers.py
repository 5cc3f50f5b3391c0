"""The nodes by which capture tells the passes where a fixed point is: calls that stand in the graph a backend gets.

A region that capture recognises is traced once, between `enter` and `leave`; a loop whose exit depends on data is traced
a few times, with a `may_exit` where each exit was passed by, and one whose count is an input with a `counted` in each of them.
These calls have no meaning of their own: the backend must consume every one of them, or ask Dynamo to trace the frame again with
that place blocked (capture/sites.py), so that the user's own code is compiled as under any other backend. Nothing here knows
Dynamo.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from .solve_info import COLUMNS

PACKAGE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(torch.__file__)
# Frames that are not the user's: torch, this package, and the library whose calls are taken over.
NOT_THE_USERS = (_TORCH, PACKAGE, os.path.join(os.path.dirname(_TORCH), "torchdeq"))

# Segments traced of a loop whose exit depends on data, before the exit is taken.
UNROLLED = 10
# The least count of a loop that is followed for whatever count it is given: more iterations than may stand outside of a region.
LEAST = 4
GUARD, HIDDEN = -1, -2


def enter(
    states: Sequence[Tensor], site: str, form: str, hints: Any = (), options: Any = (), note: str = ""
) -> tuple[Tensor, ...]:
    """The state inside a region. `hints` are pairs (option, value) that the user's code says, `options` those that it
    says to us; `note` is for the report."""
    return tuple(s.clone() for s in states)


def leave(results: Sequence[Tensor], entered: Sequence[Tensor], site: str) -> tuple[Tensor, ...]:
    """The fixed point of the map from `entered` to `results`, and one float32 tensor (B, COLUMNS) about the solve."""
    rows = results[0].shape[0] if results[0].dim() else 1
    return (*(r.clone() for r in results), results[0].new_zeros((rows, COLUMNS), dtype=torch.float32))


def adjoint_hook(z: Tensor, f: Tensor, z0: Tensor, site: str, tol: float, terms: int = 0) -> Tensor:
    """`z` with a hook that gives back w = q + (df/dz0)^T w for the cotangent q of `z`, solved to `tol`; or so many terms of the
    Neumann series of that, where `terms` is not 0."""
    return z.clone()


def adjoint_input(z: Tensor, site: str) -> Tensor:
    """`z.requires_grad_()`, of a tensor made in the graph."""
    return z.detach().clone().requires_grad_()


def untold(like: Tensor, size: Any, site: str) -> Tensor:
    """Something that the user's solver returns and no solve of ours has: nobody may use it, nor ask for its size."""
    return like.new_empty((size,))


def told(site: str, entry: int, note: str, kept: Sequence[Any] = ()) -> Tensor:
    """(COLUMNS,) float32, the largest of all samples, of what the solve of a loop tells: residual, iterations, status. The loop
    is the one at `site`, entered for the `entry`-th time; `note` is for the report. `kept` are numbers of the last iteration in a
    list that had those of all iterations: they may be looked at, and not be computed with."""
    return torch.zeros(COLUMNS)


def may_exit(predicate: Any, site: str, entry: int, exit_when: bool, cap: int) -> None:
    """The loop at `site`, entered for the `entry`-th time, ends here if bool(predicate) is `exit_when`.

    cap: the most iterations that the user's loop makes, 0 where its tests alone end it; GUARD for the test of a `while` before
        its first iteration; HIDDEN where the loop has another exit, which capture cannot count.
    """


def counted(count: Any, site: str, entry: int, left: bool) -> None:
    """One of the iterations traced of the loop at `site`, entered for the `entry`-th time, which makes `count` of them. `left`:
    whether the trace has come to its end."""


def after_none(_: None, site: str, entry: int, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Behind the loop at `site`, whose count may be 0: tensors that are read there, and what stands in their places then."""


def region(
    f: Callable[[tuple[Tensor, ...]], Sequence[Tensor]],
    states: tuple[Tensor, ...],
    site: str,
    form: str,
    hints: Any = (),
    options: Any = (),
    note: str = "",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Trace `f` once as the body of a region: the fixed point, and (B, COLUMNS) about the solve. For code that Dynamo traces."""
    entered = enter(states, site, form, hints, options, note)
    done = leave(tuple(f(entered)), entered, site)
    return done[:-1], done[-1]


has_side_effect(may_exit)
has_side_effect(counted)
has_side_effect(after_none)
has_side_effect(told)
CALLS = (enter, leave, adjoint_hook, adjoint_input, untold, told)  # what the tracer puts into the graph as it is
PASSAGES = (may_exit, counted, after_none)  # one in each iteration that was traced; the loop's site and entry are args[1:3]
MARKERS = (*CALLS, *PASSAGES)


def is_passage(target: Any) -> bool:
    return any(target is marker for marker in PASSAGES)


def is_marker(target: Any) -> bool:
    return any(target is marker for marker in MARKERS)
