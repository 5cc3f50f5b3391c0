"""Where the time of a region goes, for `record_solves(timing=True)`: wall time of the host, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from .body import Linearised

F = TypeVar("F", bound=Callable[..., Any])


class Stopwatch:
    """Seconds in the parts of one forward or backward. What a part calls is counted with the part that was called."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds = {"body": 0.0, "vjp": 0.0, "solver": 0.0}
        self.inside: list[str] = []

    def timed(self, part: str, function: F) -> F:
        """The function, its time added to a part, and taken from the part that calls it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            self.inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.inside.pop()
                spent = time.perf_counter() - begun
                self.seconds[part] += spent
                if self.inside:
                    self.seconds[self.inside[-1]] -= spent

        return run  # type: ignore[return-value]

    def read(self) -> dict[str, float]:
        """The parts so far, and as "overhead" what lies in none of them."""
        total = time.perf_counter() - self.begun
        return {**self.seconds, "overhead": total - sum(self.seconds.values())}


class TimedLinearised(Linearised):
    """A linearised body whose products are timed."""

    def __init__(self, linear: Linearised, watch: Stopwatch) -> None:
        self._vjp = watch.timed("vjp", linear.vjp)
        self._full = watch.timed("vjp", linear.vjp_full)

    def vjp(self, w: Tensor) -> Tensor:
        return self._vjp(w)

    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        return self._full(w)
