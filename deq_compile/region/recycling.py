"""Solves that begin with what earlier batches have learnt, where that is seen to pay.

What is counted are evaluations, products and their arithmetic. No clock is asked, so that equal runs decide alike.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from torch import Tensor

from deq_compile.kernels.device import on_gpu
from deq_compile.kernels.recycle import Shared
from deq_compile.kernels.recycle.sketch import ROWS

from .pool import Pool, Recycled, compressing

if TYPE_CHECKING:
    from .call import Call
    from .forward import Solution
    from .site import Site

log = logging.getLogger("deq_compile.region")

# In operations of a large matrix product: what an evaluation costs beside its own, for each element of the state and for its
# calls (40 us at 1e5 operations a us, as in worth.py), and what a stored step adds in the solver. A thin product runs at a third
# of the speed of a square one, takes 10 us of calls, and what goes through it is read and written twice more.
ELEMENT_FLOPS, CALL_FLOPS, STEP_FLOPS = 100.0, 4e6, 8.0
THIN_COST, THIN_ELEMENT, THIN_CALLS = 3.0, 100.0, 1e6
# What has to be saved: counts of one batch are not those of the next.
SAVING = 0.97


def pool_of(call: Call) -> Pool | None:
    """The pool of a call that may use it: one that records gradients, on a CPU, by a solver that takes it."""
    site = call.site
    pool = site.pool
    if pool is None or not site.spec.grad or site.follows or call.inside or call.solver.recycling is None:
        return None
    return pool if call.z0.numel() and not on_gpu(call.z0.device) else None


def solve_recycled(call: Call, pool: Pool) -> Solution:
    """The solve of a training call; `call.recycled` is what its backward gets."""
    site = call.site
    pool.keep_to(call.z0)
    shared, feeds, due = pool.forward, pool.feeds(), pool.due()
    thorough = pool.thorough() and site.spec.config.verify == "periodic"  # as where nothing is recycled
    call.recycled = Recycled(pool.adjoint, due, thorough, pool.calls if feeds else None)
    sketch = pool.sketch(site.steps, pool.calls, site.spec.body_eps) if feeds else None
    pool.calls += 1
    if due and shared is not None:
        found = _both(call, pool, shared)
    else:
        used = shared if pool.pays else None
        found = call.solved(call.z0, site.tol, shared=used, sketch=sketch)
        if used is not None and missed(found):
            found, sketch = _without(call, pool, found), None
        elif used is not None:
            pool.gain(found.evaluations)
            if pool.watch_forward.doubts(found.evaluations):
                pool.reconsider()
    if sketch is not None:
        pool.feed_forward(sketch)
    return found


def missed(found: Solution) -> bool:
    return not found.all_converged() and found.missed()


def drop(site: Site, pool: Pool, what: str) -> None:
    pool.drop(what)
    log.info("region %s at %s: a solve missed with what the %s had recycled, which is dropped", site.key, site.spec.where, what)
    site.stand()


def _without(call: Call, pool: Pool, found: Solution) -> Solution:
    """The plain solve in the place of one that missed. Where that misses too, the pool is not to blame, but it has to earn the
    evaluations that are spent twice."""
    plain = call.solved(call.z0, call.site.tol)
    if not missed(plain):
        drop(call.site, pool, "forward")
    elif not pool.lose(found.evaluations):
        log.info("region %s at %s: too many solves miss with recycled factors and without", call.site.key, call.site.spec.where)
        call.site.stand()
    return plain


def _both(call: Call, pool: Pool, shared: Shared) -> Solution:
    """The solve with the pool and without; decides between them."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    site, z0 = call.site, call.z0
    plain = call.solved(z0, site.tol)
    with FlopCounterMode(display=False) as counter:  # not around the solve: the body may be compiled there
        call.body(plain.z)
    body = counter.get_total_flops()
    recycled = call.solved(z0, site.tol, shared=shared)
    without, with_it = cost(length(plain), body, z0, 0), cost(length(recycled), body, z0, shared.rank)
    # a step is a forward and about as many products, each of which is two evaluations
    pool.note_cost(2 * compressing(z0.shape[1], ROWS), 3 * without)
    pool.decide_forward(math.inf if missed(plain) else without, math.inf if missed(recycled) else with_it, SAVING)
    pool.watch_forward.decided(plain.evaluations, recycled.evaluations)
    pays = bool(pool.pays)
    log.info(
        "region %s at %s: %d evaluations, %d with recycled factors: the forward goes on %s them",
        site.key, site.spec.where, plain.evaluations, recycled.evaluations, "with" if pays else "without",
    )  # fmt: skip
    site.stand()
    if pays:
        return recycled
    call.body(plain.z)  # what the last evaluation saves serves the backward, and the last was the other solve's
    return plain


def length(found: Solution) -> float:
    """Evaluations of the quarter of the samples that took the most: the last sample alone says little about the next batch."""
    longest = found.iterations.sort(descending=True).values
    return float(longest[: -(-len(longest) // 4)].double().mean())


def cost(evaluations: float, body: float, z: Tensor, rank: int) -> float:
    """Operations of a solve for states like z (B, D); `rank` of the shared inverse it takes, 0 for none."""
    steps = 0.5 * STEP_FLOPS * evaluations**2 * z.numel()
    return evaluations * (body + ELEMENT_FLOPS * z.numel() + CALL_FLOPS + thin(rank, z)) + steps


def thin(rank: int, z: Tensor) -> float:
    """Operations of taking states like z (B, D) through a shared inverse of that rank."""
    return (4.0 * THIN_COST * rank + THIN_ELEMENT) * z.numel() + THIN_CALLS if rank else 0.0
