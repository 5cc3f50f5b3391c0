"""What a region's training calls know of its inverse Jacobian, from batch to batch: two shared inverses, and if they pay.

The forward's is made of the secant pairs of earlier forward solves, the adjoint's of the pairs that earlier adjoint iterations
have left: cotangents of one loss lie in a small space, and so do their Krylov spaces. Nothing in a shared inverse changes: a call
takes the two as they are, and its backward gets those that its forward saw (:class:`Recycled`), whatever has come in between.
"""

from __future__ import annotations

import dataclasses
import logging

from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.recycle import Shared, Sketch, compress, rank_for, sums_for

log = logging.getLogger("deq_compile.region")

# Training calls at which it is decided what pays, and then every so many: the ways are tried on the same inputs, the forward's
# factors at the latter only.
DECIDED_AT = (10, 40, 100)
DECIDE_EVERY = 200
# Calls between two that feed the pool; more where compressing would take more than a hundredth of them (Pool.note_cost).
FEED_EVERY, SELDOM = 10, 50
FEED_SHARE = 0.01
# Where nothing pays, the pool is empty, and fed only in these calls before it is tried again.
FED_BEFORE = (11, 6, 1)
# What earlier decisions count in a later one: the counts of one batch are noise.
MEMORY = 0.5


@dataclasses.dataclass(frozen=True)
class Way:
    """How an adjoint is preconditioned.

    name     "plain"; "factors" of the forward; "shared": the pool's
    factors, shared  what that takes
    """

    name: str
    factors: Factors | None = None
    shared: Shared | None = None


@dataclasses.dataclass
class Recycled:
    """What a call hands on to its backward.

    adjoint  the pool's shared inverse for adjoints, as the forward found it
    due      whether the backward is to decide which way pays; `thorough`: between all ways
    seed     of the signs by which its pairs enter the pool; None: they do not
    way      that of the first backward through the call: later ones take it too
    """

    adjoint: Shared | None
    due: bool = False
    thorough: bool = False
    seed: int | None = None
    way: str | None = None


class Pool:
    """The shared inverses of one region.

    always    whether they are used without being asked whether they pay
    calls     training calls so far
    forward, adjoint  the shared inverses; None: there are none
    pays      whether the forward's pays; None: not known
    way       the adjoint's; None: not known
    dropped   how often a solve with it missed
    period    calls between two that feed it
    """

    def __init__(self, always: bool) -> None:
        self.always = always
        self.calls = self.dropped = 0
        self.forward: Shared | None = None
        self.adjoint: Shared | None = None
        self.pays: bool | None = True if always else None
        self.way: str | None = None
        self.period = FEED_EVERY
        self.tally = 0.0, 0.0  # operations without and with, over the decisions so far

    def due(self) -> bool:
        """Whether this call decides what pays."""
        return not self.always and self.calls == _next_decision(self.calls)

    def thorough(self) -> bool:
        """Whether all ways are tried at such a call."""
        return self.calls % DECIDE_EVERY == 0

    def idle(self) -> bool:
        """Whether it is known to pay neither way."""
        return self.pays is False and self.way not in (None, "shared")

    def feeds(self) -> bool:
        """Whether the pairs of this call enter."""
        if self.idle():
            return _next_decision(self.calls) - self.calls in FED_BEFORE
        return self.calls % self.period == 0 or (not self.always and DECIDED_AT[0] - self.calls in FED_BEFORE)

    def keep_to(self, z: Tensor) -> None:
        """Forget what is of other shapes than z (B, D), dtypes or devices."""
        if any(shared is not None and not shared.fits(z) for shared in (self.forward, self.adjoint)):
            self.forward = self.adjoint = None

    def sketch(self, pairs: int, seed: int) -> Sketch:
        """Where the pairs of a solve go, of which a sample is expected to have so many."""
        return Sketch(sums_for(pairs), seed)

    def feed_forward(self, sketch: Sketch) -> None:
        self.forward = _fed(self.forward, sketch)

    def feed_adjoint(self, sketch: Sketch) -> None:
        self.adjoint = _fed(self.adjoint, sketch)

    def decide_forward(self, without: float, with_it: float, saving: float) -> None:
        """Decide by operations without and with; inf for a solve that missed. `saving`: the share that has to be left at most."""
        if without < float("inf") and with_it < float("inf"):
            self.tally = MEMORY * self.tally[0] + without, MEMORY * self.tally[1] + with_it
            without, with_it = self.tally
        self.pays = with_it <= saving * without and with_it < float("inf")
        self._empty_if_idle()

    def decide_adjoint(self, way: str) -> None:
        self.way = way
        self._empty_if_idle()

    def drop(self) -> None:
        """A solve with it has missed: begin again, and decide again before it is used."""
        self.forward = self.adjoint = None
        self.dropped += 1
        if not self.always:
            self.pays = False
            self.way = None if self.way is None else "plain"

    def note_cost(self, compressing: float, step: float) -> None:
        """Feed so often that compressing is a small part of the steps between, both in operations."""
        wanted = int(compressing / (FEED_SHARE * step)) + 1 if step > 0 else SELDOM
        self.period = max(FEED_EVERY, min(SELDOM, wanted))

    def _empty_if_idle(self) -> None:
        if self.idle():
            self.forward = self.adjoint = None

    def __str__(self) -> str:
        """What is used, in words."""
        if self.pays is None and self.way is None:
            return "not decided yet"
        parts = ["the forward"] if self.pays else []
        parts += ["the adjoint"] if self.way == "shared" or self.always else []
        used = " and ".join(parts) if parts else "nothing, since it would not pay"
        return used + (f"; dropped {self.dropped} times, since a solve with it missed its tolerance" if self.dropped else "")


def _next_decision(calls: int) -> int:
    """The next call that decides, this one included."""
    later = -(-max(calls, 1) // DECIDE_EVERY) * DECIDE_EVERY
    return next((call for call in DECIDED_AT if call >= calls), later)


def _fed(old: Shared | None, sketch: Sketch) -> Shared | None:
    """The shared inverse with the pairs of a sketch taken in; the old one where those say nothing."""
    rows = sketch.rows()
    if rows is None:
        return old
    return compress(*rows, rank_for(rows[0].shape[1]), old) or old


def compressing(D: int, rows: int) -> float:
    """Operations of taking in so many rows: Gram matrix, its eigenvectors, and the r combinations of S and Y."""
    r = rank_for(D)
    count = rows + r
    return 2.0 * count * count * D + 4.0 * r * count * D + 25.0 * count**3 + 8.0 * r * r * D
