"""The nodes by which capture tells the passes where a fixed point is, and the way back where no pass takes it.

A region that capture recognises is traced once, between `enter` and `leave`; a loop whose exit depends on data is traced
a few times, with a `may_exit` where each exit was passed by. These calls stand in the graph that the backend gets, and
have no meaning of their own: the backend must consume every one of them, or ask Dynamo to trace the frame again with
that place blocked, so that the user's own code is compiled as under any other backend.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.fx.node import has_side_effect

from deq_compile.report import Location, Skipped
from deq_compile.solve_info import COLUMNS
from deq_compile.torch_parts import Absent
from deq_compile.unexpected import survive

from . import dynamo
from .ddp import innermost, takes_whole_graphs

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(torch.__file__)
# Frames that are not the user's: torch, this package, and the library whose calls are taken over.
NOT_THE_USERS = (_TORCH, PACKAGE, os.path.join(os.path.dirname(_TORCH), "torchdeq"))

# Segments traced of a loop whose exit depends on data, before the exit is taken.
UNROLLED = 10
GUARD, HIDDEN = -1, -2

_blocked: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
_refusals: weakref.WeakKeyDictionary[Any, list[Skipped]] = weakref.WeakKeyDictionary()


_EVERYWHERE = "*"  # among the blocked sites: nothing is captured any more for that torch.compile
_Restart: Any = RuntimeError if isinstance(dynamo.RestartFromBackend, Absent) else dynamo.RestartFromBackend


class Retrace(_Restart):
    """Dynamo traces the frame again. The base class is the one restart that may come from a backend."""


@torch._dynamo.allow_in_graph
def enter(
    states: Sequence[Tensor], site: str, form: str, hints: Any = (), options: Any = (), note: str = ""
) -> tuple[Tensor, ...]:
    """The state inside a region. `hints` are pairs (option, value) that the user's code says, `options` those that it
    says to us; `note` is for the report."""
    return tuple(s.clone() for s in states)


@torch._dynamo.allow_in_graph
def leave(results: Sequence[Tensor], entered: Sequence[Tensor], site: str) -> tuple[Tensor, ...]:
    """The fixed point of the map from `entered` to `results`, and one float32 tensor (B, COLUMNS) about the solve."""
    rows = results[0].shape[0] if results[0].dim() else 1
    return (*(r.clone() for r in results), results[0].new_zeros((rows, COLUMNS), dtype=torch.float32))


@torch._dynamo.allow_in_graph
def adjoint_hook(z: Tensor, f: Tensor, z0: Tensor, site: str, tol: float) -> Tensor:
    """`z` with a hook that gives back w = q + (df/dz0)^T w for the cotangent q of `z`, solved to `tol`."""
    return z.clone()


@torch._dynamo.allow_in_graph
def adjoint_input(z: Tensor, site: str) -> Tensor:
    """`z.requires_grad_()`, of a tensor made in the graph."""
    return z.detach().clone().requires_grad_()


def may_exit(predicate: Any, site: str, entry: int, exit_when: bool, cap: int) -> None:
    """The loop at `site`, entered for the `entry`-th time, ends here if bool(predicate) is `exit_when`.

    cap: the most iterations that the user's loop makes, 0 where its tests alone end it; GUARD for the test of a `while` before
        its first iteration; HIDDEN where the loop has another exit, which capture cannot count.
    """


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
MARKERS = (enter, leave, adjoint_hook, adjoint_input, may_exit)


def is_marker(target: Any) -> bool:
    return any(target is marker for marker in MARKERS)


def ours(tx: Any) -> bool:
    """Whether a translator traces for our backend."""
    output = tx.output
    known = getattr(output, "_deq_compile_ours", None)
    if known is None:
        known = takes_whole_graphs(output.compiler_fn) and _EVERYWHERE not in _blocked.get(_key(tx), ())
        output._deq_compile_ours = known
    return bool(known)


@contextlib.contextmanager
def guarded(tx: Any, doing: str) -> Iterator[None]:
    """Code that works within a trace. Dynamo's own exceptions steer it and pass; any other one ends capture for this
    torch.compile, and Dynamo traces the frame again without it: what was traced so far may be half of something."""
    try:
        yield
    except (dynamo.DynamoException, Retrace):
        raise
    except Exception as error:
        tell(tx, survive(error, doing, location(tx)))
        retrace([_EVERYWHERE])


def frames_of(tx: Any) -> list[tuple[str, int]]:
    """(file, line) of the frames being traced, innermost first, our own left out."""
    places = []
    while tx is not None:
        file = tx.f_code.co_filename
        if not file.startswith(PACKAGE):
            places.append((file, tx.lineno))
        tx = tx.parent
    return places


def location(tx: Any) -> Location:
    every = frames_of(tx)
    places = [place for place in every if not place[0].startswith(NOT_THE_USERS)] or every
    return Location(*places[0]) if places else Location()


def site_of(tx: Any, *more: Any) -> str:
    """A name for this place in the user's code and how it was reached; equal in every process."""
    return hashlib.sha256(repr((frames_of(tx), more)).encode()).hexdigest()[:16]


def blocked(tx: Any, site: str) -> bool:
    return site in _blocked.get(_key(tx), ())


def refuse(tx: Any, site: str, skipped: Skipped) -> None:
    """Leave a place to stock Dynamo from now on, and remember why."""
    _blocked.setdefault(_key(tx), set()).add(site)
    tell(tx, skipped)


def tell(tx: Any, skipped: Skipped) -> None:
    """Have something said in the report of the backend that is being traced for."""
    told = _refusals.setdefault(_teller(tx), [])
    if skipped not in told:
        told.append(skipped)


def refusals(backend: Any) -> list[Skipped]:
    """What capture refused while it traced for `backend` (a Backend); for its report."""
    return list(_refusals.get(backend, ()))


def clear() -> None:
    """Forget what was refused, and which places are left to stock Dynamo."""
    _blocked.clear()
    _refusals.clear()


def retrace(sites: Sequence[str]) -> None:
    """Block `sites` and have Dynamo trace the present frame again.

    Raises:
        Retrace: always, within a trace.
        RuntimeError: outside of one.
    """
    tx = dynamo.current()
    if tx is None:
        raise RuntimeError("a graph with markers of deq_compile was compiled outside of Dynamo: nobody can trace it again")
    _blocked.setdefault(_key(tx), set()).update(sites)
    # Dynamo remembers where it stood at each graph break of this attempt; the next one goes another way
    tx.speculation_log.clear()
    raise Retrace(restart_reason="deq_compile: a region that was marked is none")


def _key(tx: Any) -> Any:
    """What lives as long as one torch.compile: blocks hold for its recompilations and resumed frames."""
    fn = tx.output.compiler_fn
    return getattr(fn, "__self__", fn)


def _teller(tx: Any) -> Any:
    return innermost(tx.output.compiler_fn)
