"""Whether a solve is worth its machinery: a loop with a test that is short, of a small body, is cheaper as the user wrote it.

What decides are counts and sizes, no clock, so that equal runs decide alike: iterations of the loop in its last comparison,
evaluations and products of the solve, operations and arithmetic of the body. The prices are of one core of an Intel Xeon and of
eager PyTorch, which runs such a loop wherever Dynamo cannot trace it; they only have to be right within a factor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import records, why_kept

if TYPE_CHECKING:
    from .run import Result
    from .site import Site

log = logging.getLogger("deq_compile.region")

WEIGHED_AFTER = 3  # calls, of which the first three compare
# Microseconds. A region beside its evaluations, and its backward; the solver's step with the user's test, and a move of the
# adjoint; an operation of an eager loop, and what its backward adds.
REGION, REGION_BACKWARD = 300.0, 400.0
STEP, MOVE = 40.0, 80.0
OPERATION, OPERATION_BACKWARD = 1.5, 3.0
# What surrounds an iteration of a loop that is kept, and its product; and the share of a step that may be lost to it.
KEPT, SHARE = 25.0, 0.03
# How many times a loop's cost a solve has to come to, for the loop to be given back: that is one more compilation, and at par it
# gains nothing.
CLEARLY = 1.15
# A microsecond's work.
FLOPS, ELEMENTS = 1e5, 8e3


@dataclass(frozen=True)
class Work:
    """One evaluation of a body: arithmetic of its products, elements that it writes, operations; those of the loop's test."""

    flops: float
    elements: float
    operations: int
    in_test: int

    @property
    def microseconds(self) -> float:
        return self.flops / FLOPS + self.elements / ELEMENTS


@dataclass
class WayOut:
    """What decides whether a region is given up for the loop as the user wrote it.

    leave    has its frame traced again, with the loop left to stock Dynamo; None where that is out of the question
    settle   has its frame traced again, with `settled` set: the region is there to stay
    weighed  whether it has been asked if solving the loop pays; left: whether it was given up
    """

    work: Work
    leave: Callable[[], None] | None = None
    settle: Callable[[], None] | None = None
    settled: bool = False
    weighed: bool = False
    left: bool = False


def weigh(site: Site, found: Result) -> None:
    """After a call that was solved: give the loop back where solving it cannot pay."""
    out = site.way_out
    if out is None or out.leave is None or out.weighed or site.calls <= WEIGHED_AFTER or records.recording():
        return
    if found.solution is None or site.verdict == "kept" or found.z.device.type != "cpu":
        return
    out.weighed = True
    grad = site.spec.grad
    own = cost_of_loop(out.work, site.checked, grad)
    ours = cost_of_solve(out.work, found.solution.evaluations, site.expected_vjps or 0, grad)
    log.info(
        "region %s at %s: %d iterations take %.0f us, %d evaluations and %d products of a solve %.0f us, as estimated",
        site.key, site.spec.where, site.checked, own, found.solution.evaluations, site.expected_vjps or 0, ours,
    )  # fmt: skip
    if ours > CLEARLY * own:
        out.left = True
        out.leave()
        site.decide("kept", None, why_kept.DEAR)


def small(work: Work, grad: bool) -> bool:
    """Whether what surrounds an iteration of a kept loop is felt beside the body's work."""
    return SHARE * work.microseconds * (3 if grad else 1) < KEPT


def cost_of_loop(work: Work, iterations: int, grad: bool) -> float:
    """Estimated microseconds of the user's own loop, forward and, where gradients are recorded, backward."""
    each = work.microseconds + OPERATION * (work.operations + work.in_test)
    if grad:
        each += 2 * work.microseconds + OPERATION_BACKWARD * work.operations
    return iterations * each


def cost_of_solve(work: Work, evaluations: int, vjps: int, grad: bool) -> float:
    """Estimated microseconds of the region."""
    cost = REGION + evaluations * (work.microseconds + STEP)
    if grad:
        cost += REGION_BACKWARD + work.microseconds + vjps * (2 * work.microseconds + MOVE)
    return cost
