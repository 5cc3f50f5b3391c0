"""Named choices that can be added to from outside: solvers and backward modes."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from deq_compile.region.backward import Backward
    from deq_compile.region.solvers import Solver


class Named(Protocol):
    """What a registry holds: an object with a name."""

    name: str


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Objects by name. An option takes its choices from here, so that what is registered can be asked for at once.

    what  the kind, for messages
    home  the module that registers our own; it is imported when somebody first asks
    """

    def __init__(self, what: str, home: str) -> None:
        self.what, self.home = what, home
        self._items: dict[str, T] = {}

    def _known(self) -> dict[str, T]:
        if self.home not in sys.modules:
            importlib.import_module(self.home)
        return self._items

    def register(self, item: T) -> T:
        """Add an object under its name.

        Raises:
            ValueError: its name is no identifier, or belongs to another one.
        """
        if not item.name.isidentifier():
            raise ValueError(f"expected a {self.what} with an identifier as its name, got {item.name!r}")
        if item.name in self._items:
            raise ValueError(f"expected a new name for a {self.what}, got {item.name!r}, which is taken. Fix: choose another")
        self._items[item.name] = item
        return item

    def remove(self, name: str) -> None:
        """Forget a name; for tests that registered one."""
        del self._items[name]

    def __getitem__(self, name: str) -> T:
        """The object of a name.

        Raises:
            ValueError: there is none; the message lists those that there are.
        """
        if name in self._items:  # every call of a region asks
            return self._items[name]
        known = self._known()
        if name in known:
            return known[name]
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"expected a {self.what} among {', '.join(repr(n) for n in known)}, got {name!r}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )

    def names(self) -> tuple[str, ...]:
        """The names in the order of their registration."""
        return tuple(self._known())


# The options `solver` and `backward` take their choices from here.
SOLVERS: Registry[Solver] = Registry("solver", "deq_compile.region.solvers")
BACKWARDS: Registry[Backward] = Registry("backward mode", "deq_compile.region.backwards")
