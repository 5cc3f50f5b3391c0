"""``solver="auto"``: Broyden, Anderson acceleration or plain iteration for a region, whichever is less work at equal tolerance.

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
from .solvers import ANDERSON, AUTO, BROYDEN, PLAIN, Solver

if TYPE_CHECKING:
    from deq_compile.config import Config

    from .call import Call
    from .forward import Solution

log = logging.getLogger("deq_compile.region")

# Operations for each element of the state: a step, and what each stored step or difference adds to it. Measured on one core of an
# Intel Xeon, 4096 to 65536 elements: 0.7 + 0.16 k and 0.35 ns; Anderson's beside Broyden's on an AMD EPYC.
BROYDEN_ELEMENT, BROYDEN_STORED, PLAIN_ELEMENT = 70.0, 16.0, 35.0
ANDERSON_ELEMENT, ANDERSON_STORED = 60.0, 14.0
DECIDED_AT = (0, 20)
DECIDE_EVERY = 200
SAVING = 0.98  # what another may cost at most of the best so far: the counts of one batch are not those of the next
EASY = 1.25  # a body for which plain iteration takes at most so many times Broyden's evaluations is nothing for Anderson's
LONG = 2  # windows that Broyden's solve has to be longer than: Anderson's takes as many evaluations before
APART = 0.1  # relative distance from which on two solutions are two fixed points
APART_TOLERANCES = 100  # and how many times an absolute tolerance that is at least
AFTER_MISS = 40  # calls from a miss to the next decision, and twice as many after each further one
STOPPED = "more than "
SPOKEN = {BROYDEN.name: "Broyden", PLAIN.name: "plain iteration", ANDERSON.name: "Anderson acceleration"}


class Choice:
    """What has been decided for one region.

    solver  the one that is less work; None: not known
    several whether plain iteration and Broyden have come to different fixed points: then it is the former, which the user's
            start decides
    calls   of the region in which a choice was to be made
    counts  evaluations at the last decision, by the solver's name; those of one that was stopped are "more than" so many
    """

    def __init__(self) -> None:
        self.solver: Solver | None = None
        self.several = False
        self.calls = self.again = self.settled = self.doubted = self.missed = 0
        self.counts: dict[str, str] = {}
        self.watch = Watch()

    def due(self, periodic: bool) -> bool:
        """Whether this call tries them."""
        call = self.calls
        if self.several:
            return False
        if call in DECIDED_AT[:1] or (call == self.again and call > 0):
            return True
        return periodic and (call in DECIDED_AT or call % DECIDE_EVERY == 0)

    def tries(self, solver: Solver) -> bool:
        """Whether a call that decides asks this one again: soon after it has been stopped it is not."""
        soon = self.calls - 1 == DECIDED_AT[1]  # this call is counted
        return not soon or not self.counts.get(solver.name, "").startswith(STOPPED)

    def decide(self, solver: Solver, counts: dict[str, str], worth: float, count: int) -> None:
        """Note a decision. `worth`: evaluations by that solver that cost as much as Broyden's whole solve; `count`: its own."""
        self.solver, self.counts = solver, counts
        self.watch.decided(worth, float(count))

    def doubt(self) -> None:
        """Decide at the next call, unless that was asked for not long ago."""
        if self.calls >= self.settled:
            self.again = self.calls
            self.settled = self.calls + (AFTER_MISS << self.doubted)
            self.doubted += 1

    def miss(self) -> None:
        """The other solver has missed the tolerance: on with Broyden, for now."""
        self.solver, self.several = BROYDEN, False
        self.again = self.calls + min(AFTER_MISS << self.missed, DECIDE_EVERY)
        self.missed += 1

    def __str__(self) -> str:
        """What was chosen, and why."""
        if self.solver is None:
            return ""
        if self.several:
            return "plain iteration, since Broyden has come to another fixed point"
        others = " and ".join(SPOKEN[name] for name in self.counts if name != self.solver.name)
        counted = ", ".join(f"{count} by {SPOKEN[name]}" for name, count in self.counts.items()).replace(
            " by", " evaluations by", 1
        )
        return f"{SPOKEN[self.solver.name]}" + (f", less work than {others}: {counted}" if others else ", and no other was tried")


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
        return _tried(call, choice, needs_factors)
    solver = choice.solver
    if solver in (None, BROYDEN) or needs_factors:
        return call.solved(call.z0, site.tol)
    found = call.solved(call.z0, site.tol, solver=solver)
    if missed(found):
        choice.miss()
        log.info("region %s at %s: %s missed the tolerance, on with Broyden", site.key, site.spec.where, SPOKEN[solver.name])
        site.stand()
        return call.solved(call.z0, site.tol)
    if choice.watch.doubts(found.evaluations):
        choice.doubt()
    return found


class _Trial:
    """Broyden's solve of a call, and those of others that may turn out to be less work.

    found, solver  the best so far
    last           the solve whose last evaluation of the body was the last of all; None where that is of no use
    """

    def __init__(self, call: Call) -> None:
        self.call, self.window = call, call.site.spec.config.anderson_memory
        self.broyden = self.found = call.solved(call.z0, call.site.tol)
        self.last: Solution | None = self.broyden
        self.body, self.solver, self.several = work(call.body, self.broyden.z), BROYDEN, False
        self.counts = {BROYDEN.name: f"{self.broyden.evaluations}"}
        self.whole = self.least = self.cost(BROYDEN, self.broyden.evaluations)

    def cost(self, solver: Solver, evaluations: int = 1) -> float:
        return cost_of(solver, evaluations, self.body, self.call.z0, self.window)

    def may_pay(self, solver: Solver) -> bool:
        """Whether the solver can be less work, to judge by those that were tried."""
        if missed(self.broyden) or self.several:
            return False
        plain, broyden = self.counts.get(PLAIN.name, STOPPED), self.broyden.evaluations
        easy = not plain.startswith(STOPPED) and int(plain) <= EASY * broyden
        return solver is PLAIN or (not easy and broyden > LONG * self.window)

    def run(self, solver: Solver) -> None:
        """Solve with it, unless that turns out to be more work."""
        call, cap = self.call, math.floor(SAVING * self.least / self.cost(solver))
        if cap < 1:
            return
        config = call.site.spec.config
        last = call.solved(call.z0, call.site.tol, solver=solver, max_iter=min(cap, config.max_iter))
        self.last = None if last.raised else last
        if missed(last):
            self.counts[solver.name] = f"{STOPPED}{last.evaluations}"
            return
        self.counts[solver.name] = f"{last.evaluations}"
        apart = _apart(self.broyden.z, last.z, call.site.tol if config.stop_mode == "abs" else 0.0)
        self.several = apart and solver is PLAIN
        if self.several or not apart:
            self.found, self.solver, self.least = last, solver, self.cost(solver, last.evaluations)


def _tried(call: Call, choice: Choice, needs_factors: bool) -> Solution:
    """Broyden's solve, and others that may cost as much; decides between them."""
    site, trial = call.site, _Trial(call)
    for solver in (PLAIN, ANDERSON):
        if choice.tries(solver) and trial.may_pay(solver):
            trial.run(solver)
    choice.several = trial.several
    choice.decide(trial.solver, trial.counts, SAVING * trial.whole / trial.cost(trial.solver), trial.found.evaluations)
    log.info("region %s at %s: %s", site.key, site.spec.where, choice)
    site.stand()
    found = trial.broyden if needs_factors and not choice.several else trial.found
    if found is not trial.last:
        call.body(found.z)  # what the last evaluation saves serves the backward, and the last was another solve's
    return found


def _apart(a: Tensor, b: Tensor, tol: float) -> bool:
    """Whether two solutions (B, D) are different fixed points for any sample, and not one to within a tolerance. tol: of the
    residual's norm, where it is absolute."""
    distance, size = torch.linalg.vector_norm(a - b, dim=1), torch.linalg.vector_norm(b, dim=1)
    return bool((distance > torch.clamp(APART * size, min=APART_TOLERANCES * tol)).any())


def cost_of(solver: Solver, evaluations: int, body: float, z: Tensor, window: int) -> float:
    """Operations of a solve of so many evaluations for states like z (B, D), each of `body` operations. `window`: differences
    that Anderson's keeps."""
    if solver is PLAIN:
        return evaluations * (body + PLAIN_ELEMENT * z.numel())
    if solver is ANDERSON:
        return evaluations * (body + (ANDERSON_ELEMENT + ANDERSON_STORED * window) * z.numel())
    return evaluations * (body + BROYDEN_ELEMENT * z.numel()) + 0.5 * BROYDEN_STORED * evaluations**2 * z.numel()
