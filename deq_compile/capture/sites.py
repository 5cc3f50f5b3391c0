"""Places in the user's code: their names, which of them are left to stock Dynamo, and the way back where a region that was
marked is none."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deq_compile.markers import NOT_THE_USERS, PACKAGE
from deq_compile.report import Location, Reason, Skipped
from deq_compile.torch_parts import Absent
from deq_compile.unexpected import survive

from . import dynamo
from .ddp import innermost, takes_whole_graphs

_blocked: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
_refusals: weakref.WeakKeyDictionary[Any, list[Skipped]] = weakref.WeakKeyDictionary()


class _Marks:
    """One attribute for each loop that was followed: whether it has been given back, or is there to stay. Frames are guarded on
    theirs."""


_MARKS = _Marks()
_SETTLED = "settled"
_serials: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_serial = itertools.count()
_reached: weakref.WeakKeyDictionary[Any, dict[str, list[str]]] = weakref.WeakKeyDictionary()  # a site, and it from fewer frames
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
    return _name(frames_of(tx), more)


def _name(frames: Sequence[tuple[str, int]], more: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr((list(frames), more)).encode()).hexdigest()[:16]


def blocked(tx: Any, site: str) -> bool:
    return site in _blocked.get(_key(tx), ())


def watch(tx: Any, site: str, caller: Any, *more: Any) -> None:
    """Guard the frame on a loop that is followed: :func:`way_out` has it traced again. The site is that of `caller` and `more`;
    once it is given back, its graph ends there, and Dynamo comes to it again without some of the frames that called it."""
    if isinstance(dynamo.UserFunctionVariable, Absent):
        return
    key, frames = _key(tx), frames_of(caller)
    _reached.setdefault(key, {})[site] = [_name(frames[:depth], more) for depth in range(len(frames) + 1)]
    name = _mark(key, site)
    if not hasattr(_MARKS, name):
        setattr(_MARKS, name, False)
    dynamo.constant(tx, dynamo.UserFunctionVariable(_traced_mark).call_function(tx, [dynamo.build(tx, name)], {}))


def _traced_mark(name: str) -> Any:
    return getattr(_MARKS, name)


def _mark(key: Any, site: str) -> str:
    serial = _serials.get(key)
    if serial is None:
        serial = _serials[key] = next(_next_serial)
    return f"given_back_{serial}_{site}"


def way_out(places: Sequence[str], skipped: Skipped) -> Callable[[], None] | None:
    """What gives loops back to stock Dynamo once their graph is compiled: their frame is traced again when it is called next.
    None where nobody could: Dynamo is not at work, or the user wants one graph. `skipped` is for the report."""
    tx = dynamo.current()
    if tx is None or dynamo.must_be_whole(tx) or not _reached.get(_key(tx), {}).keys() >= set(places):
        return None
    key, teller = weakref.ref(_key(tx)), weakref.ref(backend_of(tx))

    def leave() -> None:
        owner, told = key(), teller()
        if owner is None:
            return
        _blocked.setdefault(owner, set()).update(*(_reached.get(owner, {}).get(site, [site]) for site in places))
        if told is not None:
            _refusals.setdefault(told, []).append(skipped)
        for site in places:
            setattr(_MARKS, _mark(owner, site), True)

    return leave


def settling(places: Sequence[str]) -> tuple[Callable[[], None], bool]:
    """What has the frame of loops that are there to stay traced again when it is called next, and whether that has been. To be
    asked where :func:`way_out` gives one."""
    key = _key(dynamo.current())
    names, owner = [_mark(key, site) for site in places], weakref.ref(key)

    def settle() -> None:
        if owner() is not None:
            for name in names:
                setattr(_MARKS, name, _SETTLED)

    return settle, all(getattr(_MARKS, name) == _SETTLED for name in names)


def refuse(tx: Any, site: str, skipped: Skipped) -> None:
    """Leave a place to stock Dynamo from now on, and remember why."""
    _blocked.setdefault(_key(tx), set()).add(site)
    tell(tx, skipped)


def tell(tx: Any, skipped: Skipped) -> None:
    """Have something said in the report of the backend that is being traced for."""
    told = _refusals.setdefault(backend_of(tx), [])
    if skipped not in told:
        told.append(skipped)


def has_told(tx: Any, reason: Reason, place: Location) -> bool:
    """Whether this is said of a place already."""
    return any((known.reason, known.location) == (reason, place) for known in _refusals.get(backend_of(tx), ()))


def refusals(backend: Any) -> list[Skipped]:
    """What capture refused while it traced for `backend` (a Backend); for its report."""
    return list(_refusals.get(backend, ()))


def clear() -> None:
    """Forget what was refused, and which places are left to stock Dynamo."""
    _blocked.clear()
    _refusals.clear()
    _reached.clear()


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


def backend_of(tx: Any) -> Any:
    """The backend that is traced for, whatever is wrapped around it."""
    return innermost(tx.output.compiler_fn)
