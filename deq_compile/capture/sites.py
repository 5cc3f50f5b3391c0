"""Places in the user's code: their names, which of them are left to stock Dynamo, and the way back where a region that was
marked is none."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from deq_compile.markers import NOT_THE_USERS, PACKAGE
from deq_compile.report import Location, Skipped
from deq_compile.torch_parts import Absent
from deq_compile.unexpected import survive

from . import dynamo
from .ddp import innermost, takes_whole_graphs

_blocked: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
_refusals: weakref.WeakKeyDictionary[Any, list[Skipped]] = weakref.WeakKeyDictionary()


_EVERYWHERE = "*"  # among the blocked sites: nothing is captured any more for that torch.compile
_Restart: Any = RuntimeError if isinstance(dynamo.RestartFromBackend, Absent) else dynamo.RestartFromBackend


class Retrace(_Restart):
    """Dynamo traces the frame again. The base class is the one restart that may come from a backend."""


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
