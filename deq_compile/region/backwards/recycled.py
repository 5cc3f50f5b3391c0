"""An adjoint that begins with what earlier ones have learnt, with the forward's factors, or with neither: what counts least."""

from __future__ import annotations

import dataclasses
import logging
import math

import torch
from torch import Tensor

from deq_compile.kernels.device import on_gpu
from deq_compile.region.adjoint import VJP, AdjointProblem, AdjointSolution, solve_adjoint
from deq_compile.region.backward import AdjointCall
from deq_compile.region.backwards.policy import OPERATOR_COST, operator_flops, products
from deq_compile.region.body import Linearised
from deq_compile.region.counting import dearer, thin, work
from deq_compile.region.pool import Pool, Recycled, Way
from deq_compile.region.recycling import SAVING, drop
from deq_compile.region.status import AdjointStatus

log = logging.getLogger("deq_compile.region")

USUAL_PRODUCTS = 8
PRODUCT_CALLS = 2  # of a product and of the move behind it


def solve_recycled(
    linear: Linearised, q: Tensor, call: AdjointCall, recycled: Recycled, problem: AdjointProblem, *, captures: bool = False
) -> tuple[AdjointSolution, Way]:
    """The adjoint for cotangents q (B, D), and the way it went. Where the call is due, the ways are tried, and one is chosen.
    `captures`: a captured graph may give it, where it neither feeds the pool nor is due."""
    site, pool = call.site, call.site.pool
    assert pool is not None
    ways, first = ways_of(call, recycled, pool), not call.settled.done
    way = ways[_known(call, pool, ways)]
    sketch = None
    if first and recycled.seed is not None:
        sketch = pool.sketch(call.expected or USUAL_PRODUCTS, recycled.seed)

    by_graph = captures and sketch is None and not (first and recycled.due)

    def solve(way: Way, **changes: object) -> AdjointSolution:
        asked = dataclasses.replace(problem, shared=way.shared, **changes)  # type: ignore[arg-type]
        served = call.captured(way) if by_graph else None
        return served or solve_adjoint(linear.vjp, linear.vjp_full, q, way.factors, asked)

    found = solve(way, sketch=sketch)
    if way.recycles and found.status not in (AdjointStatus.CONVERGED, AdjointStatus.FLOOR):
        if first:
            drop(site, pool, "forward" if way.shared is None else "adjoint")
        way = ways["plain"]
        found, sketch = solve(way), None
    elif first and (tried := _tried(call, recycled, ways, way, on_gpu(q.device))):
        known = {way.name: found.needed if found.status == AdjointStatus.CONVERGED else None}
        best = choose(pool, linear.vjp, q, tried, known, problem)
        site.reuse(best == "factors")
        if best != way.name:
            way = ways[best]
            found = solve(way)
        site.stand()
    elif first and way.shared is not None and pool.watch_adjoint.doubts(found.needed):
        pool.reconsider()
    if sketch is not None:
        pool.feed_adjoint(sketch)
    return found, way


def _tried(call: AdjointCall, recycled: Recycled, ways: dict[str, Way], way: Way, gpu: bool) -> dict[str, Way]:
    """The ways among which a call decides; none where it does not. On a GPU the forward's factors are not in question."""
    site, pool = call.site, call.site.pool
    assert pool is not None
    thorough = recycled.thorough or not site.backwards
    if gpu:
        thorough, pool.usual = False, "factors" if "factors" in ways else "plain"
    if len(ways) == 1 or not (recycled.due or not (site.backwards or gpu)):
        return {}
    return {name: w for name, w in ways.items() if thorough or name in (way.name, "shared", pool.usual)}


def ways_of(call: AdjointCall, recycled: Recycled, pool: Pool) -> dict[str, Way]:
    """What the options leave open, by name; "plain" is always there."""
    reuse = call.site.spec.config.reuse
    ways = {"plain": Way("plain")}
    if recycled.adjoint is not None:
        ways["shared"] = Way("shared", shared=recycled.adjoint)
    if call.factors is not None and reuse != "never":
        ways["factors"] = Way("factors", factors=call.factors)
    return ways


def _known(call: AdjointCall, pool: Pool, ways: dict[str, Way]) -> str:
    """The way to go, as far as it is known: that of the first backward of this call, of the options, or that was decided on."""
    wanted = pool.way
    if call.settled.done:
        wanted = call.settled.way
    elif call.site.spec.config.reuse == "always":
        wanted = "factors"
    elif pool.always:
        wanted = "shared"
    if wanted in ways:
        return wanted
    return "factors" if "factors" in ways and call.reuses else "plain"


@torch.no_grad()
def choose(pool: Pool, vjp: VJP, q: Tensor, ways: dict[str, Way], known: dict[str, int | None], problem: AdjointProblem) -> str:
    """The way to go on with: the pool's, where that saves something against what would be done without it. That in turn is
    settled where the forward's factors and the plain way are both among `ways`, as it is where nothing is recycled.

    Args:
        known: products of ways that were gone already, None for one that missed.
    """
    product = work(vjp, q, PRODUCT_CALLS)
    needed = dict(known)
    for name, way in sorted(ways.items(), key=lambda item: item[0] == "shared"):  # which has to need no more than the others
        if name not in needed:
            most = min((n for n in needed.values() if name == "shared" and n is not None), default=problem.max_iter)
            asked = dataclasses.replace(problem, shared=way.shared, max_iter=most)
            needed[name] = products(vjp, q, way.factors, asked, contest=most < problem.max_iter)
    log.info("adjoint: products %s", needed)
    if {"plain", "factors"} <= {*ways} and not on_gpu(q.device):
        pool.usual = _usual(ways["factors"], q, needed["plain"], needed["factors"], product)

    def cost(name: str) -> float:
        count = needed.get(name)
        return math.inf if count is None else count * product + own_cost(ways[name], q, count)

    fewer = (needed.get("shared") or math.inf) <= (needed.get(pool.usual) or math.inf)
    if on_gpu(q.device) and fewer and "shared" in ways:  # there launches may be what counts
        fewer = (needed["shared"] or math.inf) * dearer(vjp, q) <= SAVING * (needed.get(pool.usual) or math.inf)
    best = "shared" if fewer and cost("shared") < SAVING * cost(pool.usual) else pool.usual
    pool.decide_adjoint(best)
    pool.watch_adjoint.decided(needed.get(pool.usual) or math.inf, needed.get("shared") or math.inf)
    return best


def _usual(factors: Way, q: Tensor, plain: int | None, reused: int | None, product: float) -> str:
    """Whether the forward's factors are used where there is no pool; see :func:`~.policy.factors_pay`."""
    if plain is None or reused is None:
        return "factors"
    return "factors" if (plain - reused) * product > own_cost(factors, q, reused) else "plain"


def own_cost(way: Way, q: Tensor, count: int) -> float:
    """Operations of a way beside its products."""
    cost = OPERATOR_COST * operator_flops(way.factors.n, q.shape[1], count + 1) if way.factors is not None else 0.0
    shared = way.shared if way.factors is None else way.factors.shared
    return cost if shared is None else cost + thin(shared.rank, q) * (count + 1)
