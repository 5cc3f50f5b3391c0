"""What is kept of a body for the shapes that it was called with."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from deq_compile.compiling import alone

if TYPE_CHECKING:
    from .body import Runner
    from .program import Program
    from .sizes import Sizes


class Family:
    """Calls of a body that differ in sizes only.

    general  programs that serve more than one of them
    off      whether one such program could not be made: none is tried again
    """

    def __init__(self) -> None:
        self.general: list[Program] = []
        self.off = False
        self._first: tuple[int, ...] = ()
        self._varied: set[int] = set()

    def free(self, sizes: Sizes, symbols: tuple[Any, ...]) -> dict[int, Any]:
        """What stands for the sizes, by their index, that are no constants: equal for those that have been equal.

        `symbols` is what they are in the graph around. Sizes 0 and 1 are constants: they broadcast.
        """
        self._first = self._first or sizes.dims
        self._varied |= {i for i, (n, m) in enumerate(zip(sizes.dims, self._first, strict=True)) if n != m}
        if len(symbols) != len(sizes.dims):
            symbols = (None,) * len(sizes.dims)
        found = {}
        for i, (n, m, symbol) in enumerate(zip(sizes.dims, self._first, symbols, strict=True)):
            if n > 1 and (symbol is not None or i in self._varied):
                found[i] = (m, n) if symbol is None else symbol
        return found


class Shapes:
    """The runners of one body by shapes, and how many programs were compiled for it: those are never given up for new ones."""

    def __init__(self) -> None:
        self.runners: dict[tuple[Any, ...], Runner] = {}
        self.families: dict[tuple[Any, ...], Family] = {}
        self.compiled = 0

    def clear(self) -> None:
        self.runners.clear()
        self.families.clear()
        self.compiled = 0


# Held by the specs of all bodies with that hash, and gone with the last.
_bodies: weakref.WeakValueDictionary[tuple[Any, ...], Shapes] = weakref.WeakValueDictionary()


def shapes_of(key: tuple[Any, ...]) -> Shapes:
    with alone:
        found = _bodies.get(key)
        if found is None:
            found = _bodies[key] = Shapes()
        return found


def clear() -> None:
    """Forget all compiled bodies."""
    with alone:
        for shapes in list(_bodies.values()):
            shapes.clear()
