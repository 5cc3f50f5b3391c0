"""A loop whose count comes with each call: what is known of it, count by count.

The body, and so its fixed point, is one for all counts. Whether the loop has come near enough to it hangs on the count: what was
found at two counts holds for those between them, a loop that is kept is kept at every lower count, and elsewhere it is compared
when it is met. The longest and the shortest count of so many that are drawn change seldom, so that a run compares a few times.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .site import RegionSpec, Site

REMEMBERED = 64  # counts whose facts are held; others are made again
SHORTER = 4  # of the counts that are solved, the lowest in so many parts of their range


class Counts:
    """What the counts of a region have shown.

    kept    the largest count at which the loop is kept, 0 for none
    solved  the least and the largest count at which something shorter stands in for it; None before
    owed    whether one of the shorter counts is to be compared when it comes
    here    what a site is at the count of the call at work in this thread
    """

    def __init__(self, spec: RegionSpec, always: str | None) -> None:
        """`always`: the verdict of all counts, where no comparison decides."""
        self.always, self.kept, self.owed, self.here = always, 0, False, threading.local()
        self.solved: tuple[int, int] | None = None
        self._specs: dict[int, RegionSpec] = {}
        self._spec = spec

    def __str__(self) -> str:
        if self.always is not None:
            return ""
        told = [] if self.solved is None else ["solved from {} to {} iterations".format(*self.solved)]
        return ", ".join([*told, *([f"kept up to {self.kept}"] if self.kept else [])])

    def spec(self, count: int) -> RegionSpec:
        """The facts of a call of so many iterations: a loop of too few is meant as it is written, whatever a longer one means."""
        found = self._specs.get(count)
        if found is None:
            if len(self._specs) >= REMEMBERED:
                self._specs.clear()
            config = self._spec.config
            if self.is_short(count):
                config = dataclasses.replace(config, semantics="loop")
            found = self._specs[count] = dataclasses.replace(self._spec, iterations=count, config=config)
        return found

    def is_short(self, count: int) -> bool:
        """Whether a loop of so many iterations is none that is solved: no solve needs fewer evaluations."""
        return count < self._spec.config.min_repeats

    def due(self, count: int, scheduled: bool) -> bool:
        """Whether a call is compared, where one of any count is `scheduled` to be or not. It is at the shorter counts that a loop
        which has become slow is first away from the fixed point: one of those follows, when it comes."""
        if self.is_short(count):
            return False
        self.owed = self.owed or scheduled
        low = self.solved is None or count <= self.solved[0] + (self.solved[1] - self.solved[0]) // SHORTER
        found = scheduled or (self.owed and low)
        self.owed = self.owed and not (found and low)
        return found

    def verdict(self, count: int, solving: str) -> str:
        """How to go on at a count: by what was found, or "pending"."""
        if self.is_short(count):
            return "kept"
        if self.always is not None:
            return self.always
        if count <= self.kept:
            return "kept"
        return solving if self.solved is not None and self.solved[0] <= count <= self.solved[1] else "pending"

    def decided(self, count: int, verdict: str) -> None:
        """Take note of what was decided at a count; that a short loop is kept says nothing of others."""
        if self.is_short(count):
            return
        if verdict == "kept":
            self.kept = max(self.kept, count)
            if self.solved is not None and self.kept >= self.solved[0]:
                self.solved = None  # an end that was no end: every count above is compared again
            return
        least, most = (count, count) if self.solved is None else self.solved
        self.solved, self.kept = (min(least, count), max(most, count)), min(self.kept, count - 1)


class OfCall:
    """An attribute of a site: of each thread its own, where a count comes with each call."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, site: Site, owner: type | None = None) -> Any:
        counts = site.__dict__.get("counts")
        common = site.__dict__[self.name]
        return common if counts is None else getattr(counts.here, self.name, common)

    def __set__(self, site: Site, value: Any) -> None:
        counts = site.__dict__.get("counts")
        if counts is None:
            site.__dict__[self.name] = value
        else:
            setattr(counts.here, self.name, value)


def due(site: Site, scheduled: bool) -> bool:
    """Whether a call is compared, where one is `scheduled` to be or not."""
    return scheduled if site.counts is None else site.counts.due(site.spec.iterations or 0, scheduled)


def enter(site: Site, sizes: list[int]) -> list[int]:
    """Let a site be that of a call's count, where that comes with the call; the sizes that the body is given."""
    counts = site.counts
    if counts is None:
        return sizes
    *rest, given = sizes
    count = max(int(given) - (site.spec.outside or 0), 0)
    site.spec = counts.spec(count)
    site.verdict = counts.verdict(count, site.solving)
    return rest
