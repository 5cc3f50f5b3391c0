"""Solves that begin with what earlier batches have learnt, where that is seen to pay.

What is counted are evaluations, products and their arithmetic. No clock is asked, so that equal runs decide alike.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from deq_compile.kernels.device import on_gpu
from deq_compile.kernels.recycle import Shared
from deq_compile.kernels.recycle.sketch import ROWS

from .counting import dearer, thin, work
from .pool import Pool, Recycled, compressing

if TYPE_CHECKING:
    from .call import Call
    from .forward import Solution
    from .site import Site

log = logging.getLogger("deq_compile.region")

# What a stored step adds to a step of the solver, for each element of the state.
STEP_FLOPS = 8.0
# What has to be saved: counts of one batch are not those of the next.
SAVING = 0.97


def pool_of(call: Call) -> Pool | None:
    """The pool of a call that may use it: one that records gradients, by a solver that takes it. On a GPU "auto" is off where a
    graph is to serve: calls that feed the pool are driven by the host, and what that costs no count says."""
    site = call.site
    pool = site.pool
    if pool is None or not site.spec.grad or site.follows or call.inside or call.solver.recycling is None:
        return None
    if not call.z0.numel():
        return None
    refused = site.engine == "loop" and bool(site.engine_reason)
    by_graph = not (pool.always or not on_gpu(call.z0.device) or call.host_driven() or refused)
    if by_graph != pool.by_graph:
        pool.by_graph = by_graph
        site.stand()
    return None if by_graph else pool


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
        if used is None and sketch is None and not due and pool.way != "factors":
            found, count = call.usual(), 0
        else:
            served = call.captured(used) if sketch is None and not due else None
            found = call.solved(call.z0, site.tol, shared=used, sketch=sketch) if served is None else served
            count = evaluations(found)
        pool.note(count or found.evaluations)
        if used is not None and missed(found):
            found, sketch = _where_it_missed(call, pool, found), None
        elif used is not None and pool.watch_forward.doubts(count):
            pool.reconsider()
    if sketch is not None:
        pool.feed_forward(sketch)
    return found


def evaluations(found: Solution) -> int:
    """Of a solve. A captured one is waited for; where the host looks at a device now and then, it has made some more."""
    if found.outcome is not None:
        return found.outcome.outcome()[1]
    return int(found.iterations.max()) if on_gpu(found.z.device) else found.evaluations


def missed(found: Solution) -> bool:
    return not found.all_converged() and found.missed()


def drop(site: Site, pool: Pool, what: str) -> None:
    pool.drop(what)
    log.info("region %s at %s: a solve missed with what the %s had recycled, which is dropped", site.key, site.spec.where, what)
    site.stand()


def _where_it_missed(call: Call, pool: Pool, found: Solution) -> Solution:
    """The plain solve in the place of one that missed: always where the user's own loop would have to be run, else now and then.
    Where that misses too, the pool is not to blame."""
    if call.site.spec.own_loop_cap is None and not pool.doubtful():
        return found
    plain = call.solved(call.z0, call.site.tol)
    if not missed(plain):
        drop(call.site, pool, "forward")
    return plain


def _both(call: Call, pool: Pool, shared: Shared) -> Solution:
    """The solve with the pool and without; decides between them."""
    site, z0 = call.site, call.z0
    plain = call.solved(z0, site.tol)
    body = work(call.body, plain.z)  # after a solve: the body may be compiled there
    recycled = call.solved(z0, site.tol, shared=shared)
    counts = evaluations(plain), evaluations(recycled)
    pool.note(counts[0])
    pool.note(counts[1], counts[1])
    without, with_it = (_all(call, found, body, rank) for found, rank in ((plain, 0), (recycled, shared.rank)))
    if on_gpu(z0.device):
        with_it = max(with_it, without * length(recycled) / length(plain) * dearer(call.body, plain.z))
    # a step is a forward and about as many products, each of which is two evaluations
    pool.note_cost(2 * compressing(z0.shape[1], ROWS), 3 * without)
    if missed(plain) and missed(recycled):
        pool.undecided()
    elif recycled.raised:
        drop(site, pool, "forward")
    else:
        pool.decide_forward(without, with_it, SAVING)
    pool.watch_forward.decided(*counts)
    pays = bool(pool.pays)
    log.info(
        "region %s at %s: %d evaluations, %d with recycled factors: the forward goes on %s them",
        site.key, site.spec.where, *counts, "with" if pays else "without",
    )  # fmt: skip
    site.stand()
    if pays:
        return recycled
    call.body(plain.z)  # what the last evaluation saves serves the backward, and the last was the other solve's
    return plain


def _all(call: Call, found: Solution, body: float, rank: int) -> float:
    """Operations of a solve, and of what follows where it missed: the user's loop, or as many plain iterations."""
    spec, evaluations = call.site.spec, length(found)
    more = (spec.own_loop_cap or spec.config.max_iter) if missed(found) else 0
    return cost(evaluations, body, call.z0, rank) + more * body


def length(found: Solution) -> float:
    """Evaluations of the quarter of the samples that took the most: the last sample alone says little about the next batch."""
    longest = found.iterations.sort(descending=True).values
    return float(longest[: -(-len(longest) // 4)].double().mean())


def cost(evaluations: float, body: float, z: Tensor, rank: int) -> float:
    """Operations of a solve for states like z (B, D), by evaluations of `body` each; `rank` of the shared inverse it takes, 0
    for none."""
    steps = 0.5 * STEP_FLOPS * evaluations**2 * z.numel()
    return evaluations * (body + thin(rank, z)) + steps
