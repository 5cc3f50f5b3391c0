"""``solver="auto"``: Broyden or plain iteration for a region, whichever is less work at equal tolerance, as counted.

What is counted are evaluations and their arithmetic (``counting``).
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deq_compile.kernels.device import on_gpu

from .counting import work
from .pool import Watch
from .recycling import missed
from .solvers import AUTO, PLAIN

if TYPE_CHECKING:
    from deq_compile.config import Config

    from .call import Call
    from .forward import Solution

log = logging.getLogger("deq_compile.region")

# Operations for each element of the state: a Broyden step, what each stored step adds to it, and a plain step. Measured on one
# core of an Intel Xeon, 4096 to 65536 elements: 0.7 + 0.16 k and 0.35 ns.
BROYDEN_ELEMENT, BROYDEN_STORED, PLAIN_ELEMENT = 70.0, 16.0, 35.0
DECIDED_AT = (0, 20)
DECIDE_EVERY = 200
SAVING = 0.98  # what plain iteration may cost at most of Broyden's: the counts of one batch are not those of the next
APART = 0.1  # relative distance from which on two solutions are two fixed points
AFTER_MISS = 40  # calls from a miss to the next decision, and twice as many after each further one


class Choice:
    """What has been decided for one region.

    plain   whether plain iteration is less work; None: not known
    several whether the two have come to different fixed points: then plain iteration it is, which the user's start decides
    calls   of the region in which a choice was to be made
    counts  evaluations by Broyden and by plain iteration at the last decision; those of a plain one that was stopped are "more"
    """

    def __init__(self) -> None:
        self.plain: bool | None = None
        self.several = False
        self.calls = self.again = self.settled = self.doubted = self.missed = 0
        self.counts = 0, ""
        self.watch = Watch()

    def due(self, periodic: bool) -> bool:
        """Whether this call tries both."""
        call = self.calls
        if self.several:
            return False
        if call in DECIDED_AT[:1] or (call == self.again and call > 0):
            return True
        return periodic and (call in DECIDED_AT or call % DECIDE_EVERY == 0)

    def decide(self, plain: bool, broyden: int, found: str, worth: float) -> None:
        """Note a decision. `worth`: evaluations of plain iteration that cost as much as Broyden's whole solve."""
        self.plain, self.counts = plain, (broyden, found)
        self.watch.decided(worth, float(broyden))

    def doubt(self) -> None:
        """Decide at the next call, unless that was asked for not long ago."""
        if self.calls >= self.settled:
            self.again = self.calls
            self.settled = self.calls + (AFTER_MISS << self.doubted)
            self.doubted += 1

    def miss(self) -> None:
        """Plain iteration has missed the tolerance: on with Broyden, for now."""
        self.plain = False
        self.again = self.calls + min(AFTER_MISS << self.missed, DECIDE_EVERY)
        self.missed += 1

    def __str__(self) -> str:
        """What was chosen, and why."""
        if self.plain is None:
            return ""
        if self.several:
            return "plain iteration, since Broyden has come to another fixed point"
        name, other = ("plain iteration", "Broyden") if self.plain else ("Broyden", "plain iteration")
        broyden, plain = self.counts
        return f"{name}, less work than {other}: {broyden} evaluations by Broyden, {plain} by plain iteration"


def choice_for(config: Config) -> Choice | None:
    """Where what is decided for a new region is kept; None where the options name its solver."""
    return Choice() if config.solver == AUTO.name else None


def choice_of(call: Call) -> Choice | None:
    """The choice of a call that may make one: on a CPU, where nobody captures it."""
    choice = call.site.choice
    return choice if choice is not None and not call.inside and call.z0.numel() and not on_gpu(call.z0.device) else None


def solve_chosen(call: Call, choice: Choice) -> Solution:
    """The solve of a region by the solver that is less work."""
    site = call.site
    periodic = site.spec.config.verify == "periodic"
    due = choice.due(periodic)
    choice.calls += 1
    needs_factors = not choice.several and site.spec.stores_steps and (site.reuses or site.reuse_due())
    if due:
        return _both(call, choice, needs_factors)
    if not choice.plain or needs_factors:
        return call.solved(call.z0, site.tol)
    found = call.solved(call.z0, site.tol, solver=PLAIN)
    if missed(found):
        choice.miss()
        log.info("region %s at %s: plain iteration missed the tolerance, on with Broyden", site.key, site.spec.where)
        site.stand()
        return call.solved(call.z0, site.tol)
    if choice.watch.doubts(found.evaluations):
        choice.doubt()
    return found


def _both(call: Call, choice: Choice, needs_factors: bool) -> Solution:
    """Broyden's solve and a plain one that may cost as much; decides between them."""
    site, z0 = call.site, call.z0
    broyden = call.solved(z0, site.tol)
    worth = allowed(broyden.evaluations, work(call.body, broyden.z), z0)
    plain = None
    if not missed(broyden) and worth >= 1:
        plain = call.solved(z0, site.tol, solver=PLAIN, max_iter=min(math.floor(worth), site.spec.config.max_iter))
    pays = plain is not None and not missed(plain)
    counted = "not tried" if plain is None else f"{plain.evaluations}" if pays else f"more than {plain.evaluations}"
    choice.decide(pays, broyden.evaluations, counted, worth)
    if pays and plain is not None and _apart(broyden.z, plain.z):
        choice.several, needs_factors = True, False
    log.info("region %s at %s: %s", site.key, site.spec.where, choice)
    site.stand()
    if pays and not needs_factors:
        assert plain is not None
        return plain
    if plain is not None:
        call.body(broyden.z)  # what the last evaluation saves serves the backward, and the last was the other solve's
    return broyden


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two solutions (B, D) are different fixed points for any sample, and not one to within a tolerance."""
    distance, size = torch.linalg.vector_norm(a - b, dim=1), torch.linalg.vector_norm(b, dim=1)
    return bool((distance > APART * size).any())


def allowed(evaluations: int, body: float, z: Tensor) -> float:
    """How many evaluations plain iteration may take to be less work than a Broyden solve of so many: for states like z (B, D)
    and evaluations of `body` operations each."""
    ours = evaluations * (body + BROYDEN_ELEMENT * z.numel()) + 0.5 * BROYDEN_STORED * evaluations**2 * z.numel()
    return SAVING * ours / (body + PLAIN_ELEMENT * z.numel())
