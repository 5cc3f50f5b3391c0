"""What a region's training calls know of its inverse Jacobian, from batch to batch: two shared inverses, and if they pay.

The forward's is made of the secant pairs of earlier forward solves, the adjoint's of the pairs that earlier adjoint iterations
have left: cotangents of one loss lie in a small space, and so do their Krylov spaces. Nothing in a shared inverse changes: a call
takes the two as they are, and its backward gets those that its forward saw (:class:`Recycled`), whatever has come in between.
"""

from __future__ import annotations

import dataclasses
import logging
import math

from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.recycle import Shared, Sketch, compress, rank_for, sums_for

log = logging.getLogger("deq_compile.region")

# Training calls at which it is decided what pays, and then every so many: the ways are tried on the same inputs, the forward's
# factors at the latter only.
DECIDED_AT = (20, 100)
DECIDE_EVERY = 200
# Calls between two that feed the pool; more where compressing would take more than a hundredth of them (Pool.note_cost).
FEED_EVERY, SELDOM = 10, 50
FEED_SHARE = 0.01
# Where nothing pays, the pool is empty, and fed only in these calls before it is tried again: fewer know too little of the
# inverse for the first decision to say anything of the later ones.
FED_BEFORE = (18, 15, 12, 9, 6, 3, 1)
# What earlier decisions count in a later one: the counts of one batch are noise.
MEMORY = 0.5
# Calls from a miss to the next decision, and twice as many after each further one.
AFTER_MISS = 20
# Decisions beside the usual ones may cost this share of all evaluations.
SHARE = 0.01
# What one decision says of the ratio of costs at most: a solve that misses costs several times as much, now and then.
LEAST_RATIO, MOST_RATIO = 0.7, 1.4


@dataclasses.dataclass(frozen=True)
class Way:
    """How an adjoint is preconditioned.

    name     "plain"; "factors" of the forward; "shared": the pool's
    factors, shared  what that takes
    """

    name: str
    factors: Factors | None = None
    shared: Shared | None = None

    @property
    def recycles(self) -> bool:
        """Whether something of earlier batches is in it: factors of a forward that began so hold it too."""
        return self.shared is not None or (self.factors is not None and self.factors.shared is not None)


@dataclasses.dataclass
class Recycled:
    """What a call hands on to its backward.

    adjoint  the pool's shared inverse for adjoints, as the forward found it
    due      whether the backward is to decide which way pays; `thorough`: between all ways
    seed     of the signs by which its pairs enter the pool; None: they do not
    """

    adjoint: Shared | None
    due: bool = False
    thorough: bool = False
    seed: int | None = None


class Watch:
    """Whether what was decided is still as good as what was decided against was then: training changes the body."""

    WEIGHT = 0.25  # of a count in the running mean

    def __init__(self) -> None:
        self.limit = self.recent = math.inf

    def decided(self, without: float, with_it: float) -> None:
        """Note the counts, evaluations or products, of a decision."""
        self.limit, self.recent = without, with_it

    def doubts(self, count: int) -> bool:
        """Note a count with the pool in use; whether such counts have passed what they were without."""
        self.recent += self.WEIGHT * (count - self.recent)
        return self.recent > self.limit


class Pool:
    """The shared inverses of one region.

    always    whether they are used without being asked whether they pay
    calls     training calls so far
    forward, adjoint  the shared inverses; None: there are none
    pays      whether the forward's pays; None: not known
    way       the adjoint's; None: not known
    usual     what it would be without the pool
    dropped   how often a solve with it missed
    period    calls between two that feed it
    by_graph  whether it is off, since calls like the last one are a CUDA graph's
    """

    def __init__(self, always: bool) -> None:
        self.always = always
        self.calls = self.dropped = 0
        self.forward: Shared | None = None
        self.adjoint: Shared | None = None
        self.pays: bool | None = True if always else None
        self.way: str | None = None
        self.usual = "plain"
        self.period = FEED_EVERY
        self.by_graph = False
        self.tally = 0.0, 0.0  # ratios of operations with and without, and their weights, over the decisions so far
        self.misses = 0  # of solves with the pool, since one was seen to be its fault
        self.spent = self.evaluations = 0  # by decisions; by all calls
        self.again = 0  # a call that decides beside the usual ones
        self.watch_forward, self.watch_adjoint = Watch(), Watch()
        self.doubted, self.settled = 0, 0  # how often, and until which call it is not again

    def due(self) -> bool:
        """Whether this call decides what pays."""
        return not self.always and self.calls == self._next_decision()

    def thorough(self) -> bool:
        """Whether all ways are tried at such a call."""
        return self.calls % DECIDE_EVERY == 0

    def idle(self) -> bool:
        """Whether it is known to pay neither way."""
        return self.pays is False and self.way not in (None, "shared")

    def feeds(self) -> bool:
        """Whether the pairs of this call enter."""
        if self.idle():
            return self._next_decision() - self.calls in FED_BEFORE
        return self.calls % self.period == 0 or (not self.always and DECIDED_AT[0] - self.calls in FED_BEFORE)

    def keep_to(self, z: Tensor) -> None:
        """Forget what is of other shapes than z (B, D), dtypes or devices."""
        if any(shared is not None and not shared.fits(z) for shared in (self.forward, self.adjoint)):
            self.forward = self.adjoint = None

    def sketch(self, pairs: int, seed: int, body_eps: float | None = None) -> Sketch:
        """Where the pairs of a solve go, of which a sample is expected to have so many."""
        return Sketch(sums_for(pairs), pairs, seed, body_eps)

    def feed_forward(self, sketch: Sketch) -> None:
        self.forward = _fed(self.forward, sketch)

    def feed_adjoint(self, sketch: Sketch) -> None:
        self.adjoint = _fed(self.adjoint, sketch)

    def decide_forward(self, without: float, with_it: float, saving: float) -> None:
        """Decide by operations without and with, of which the share `saving` may be left at most."""
        ratio = min(max(with_it / without, LEAST_RATIO), MOST_RATIO) if without > 0 else 1.0
        self.tally = MEMORY * self.tally[0] + ratio, MEMORY * self.tally[1] + 1.0
        self.pays = self.tally[0] <= saving * self.tally[1]
        self._empty_if_idle()

    def undecided(self) -> None:
        """Both solves of a decision have missed: ask the next call."""
        self.again, self.pays = self.calls, bool(self.pays)

    def note(self, evaluations: int, deciding: int = 0) -> None:
        """Note the evaluations of a call, and how many of them were for a decision."""
        self.evaluations += evaluations
        self.spent += deciding

    def decide_adjoint(self, way: str) -> None:
        self.way = way
        self._empty_if_idle()

    def drop(self, what: str) -> None:
        """A solve with the shared inverse for "forward" or "adjoint" has missed: make it anew, decide before it is used."""
        setattr(self, what, None)
        self.dropped += 1
        self.misses = 0
        if not self.always:
            if what == "forward":
                self.pays = False
            else:
                self.way = self.usual
            self.again = self.calls + min(AFTER_MISS << (self.dropped - 1), DECIDE_EVERY)

    def doubtful(self) -> bool:
        """Note that a solve with it has missed; whether it is to be seen if one without does: at misses 1, 2, 4, 8, ..., since
        without it no fewer are to be expected."""
        self.misses += 1
        return self.misses & (self.misses - 1) == 0

    def reconsider(self) -> None:
        """Decide at the next call, unless that was asked for not long ago."""
        if self.calls >= self.settled and not self.always:
            self.again = self.calls
            self.settled = self.calls + (AFTER_MISS << self.doubted)
            self.doubted += 1

    def note_cost(self, compressing: float, step: float) -> None:
        """Feed so often that compressing is a small part of the steps between, both in operations."""
        wanted = int(compressing / (FEED_SHARE * step)) + 1 if step > 0 else SELDOM
        self.period = max(FEED_EVERY, min(SELDOM, wanted))

    def _next_decision(self) -> int:
        """The next call that decides, this one included."""
        later = -(-max(self.calls, 1) // DECIDE_EVERY) * DECIDE_EVERY
        usual = next((call for call in DECIDED_AT if call >= self.calls), later)
        extra = self.again >= self.calls > 0 and self.spent <= SHARE * self.evaluations
        return min(usual, self.again) if extra else usual

    def _empty_if_idle(self) -> None:
        if self.idle():
            self.forward = self.adjoint = None

    def __str__(self) -> str:
        """What is used, in words."""
        if self.by_graph:
            return "nothing, since a CUDA graph serves and recycle is 'auto'"
        if self.pays is None and self.way is None:
            return "not decided yet"
        parts = ["the forward"] if self.pays else []
        parts += ["the adjoint"] if self.way == "shared" or self.always else []
        used = " and ".join(parts) if parts else "nothing, since it would not pay"
        return used + (f"; dropped {self.dropped} times, since a solve with it missed its tolerance" if self.dropped else "")


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
