"""A region's own iterations: run as they were, and differentiated as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from . import records
from .body import Runner
from .forward import solve
from .layout import Layout
from .site import Site
from .stop import any_of


def iterate(body: Callable[[Tensor], Tensor], z: Tensor, times: int) -> Tensor:
    if not z.numel():
        return z.clone()  # an output may not share memory with an input
    for _ in range(times):
        z = body(z)
    return z


def own_iterations(
    site: Site, layout: Layout, runner: Runner, z0: Tensor, operands: Sequence[Tensor], sizes: Sequence[int]
) -> int:
    """Iterations after which the user's own loop ends."""
    spec = site.spec
    assert spec.own_cap is not None
    return solve(
        lambda z: runner.apply(z, operands),
        z0,
        solver="picard",
        tol=site.tol,
        stop_mode=spec.config.stop_mode,
        max_iter=spec.own_cap,
        body_eps=spec.body_eps,
        stop=any_of(spec.stop, layout, (*operands, *sizes)),
    ).evaluations


def loop_gradient(
    site: Site,
    layout: Layout,
    runner: Runner,
    z0: Tensor,
    q: Tensor,
    operands: Sequence[Tensor],
    needs: tuple[bool, ...],
    serial: int,
    count: int | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The exact gradient of a loop: recompute its N iterates, then one VJP at each, last to first. Where a fixed point was
    declared there is no N, and the loop is that of `count` plain iterations, by default `max_iter`."""
    count = count or site.spec.iterations or site.spec.config.max_iter
    total: list[Tensor | None] = [None] * sum(needs)
    w = q
    for iterate in iterates_backwards(runner, z0, operands, count, site.spec.config.loop_memory):
        w, grads = runner.linearise(iterate, operands, needs).vjp_full(w)
        total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
    if serial:
        records.complete(serial, cotangent=q, w=q, vjps=count, adjoint_message="the loop's own gradient")
    return layout.unflatten(w), total


def iterates_backwards(
    runner: Runner, z0: Tensor, operands: Sequence[Tensor], count: int, memory: int | None
) -> Iterator[Tensor]:
    """z_{N-1}, ..., z_0. With `memory` m < N, at most about N/m + m of them are held: every m-th is stored, and the segment
    behind it is computed again when its turn comes."""
    stride = count if memory is None else min(memory, count)
    stored = [z0]
    while len(stored) * stride < count:
        z = stored[-1]
        for _ in range(stride):
            z = runner.apply(z, operands)
        stored.append(z)
    left = count - (len(stored) - 1) * stride
    while stored:
        segment = [stored.pop()]
        for _ in range(left - 1):
            segment.append(runner.apply(segment[-1], operands))
        while segment:
            yield segment.pop()
        left = stride
