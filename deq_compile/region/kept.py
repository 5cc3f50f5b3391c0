"""A region's own iterations: run as they were, and differentiated as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from . import records
from .body import Linearised, Runner
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


def iterate_and_linearise(
    runner: Runner, operands: Sequence[Tensor], needs: tuple[bool, ...], z: Tensor, times: int
) -> tuple[Tensor, list[Linearised]]:
    """As `iterate`, and the body linearised at each iterate but the last: what the loop itself would save."""
    linears = []
    for _ in range(times if z.numel() else 0):
        z, linear = runner.evaluate_and_linearise(z, operands, needs)
        linears.append(linear)
    return z, linears


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
    linears: Sequence[Linearised] = (),
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The exact gradient of a loop: one VJP at each of its N iterates, last to first. `linears` is the body linearised at each;
    where it is empty, they are computed again. Where a fixed point was declared there is no N, and the loop is that of `count`
    plain iterations, by default `max_iter`."""
    count = count or site.spec.iterations or site.spec.config.max_iter
    total: list[Tensor | None] = [None] * sum(needs)
    own = [False] * len(total)
    w = q
    backwards = reversed(linears) if linears else (
        runner.linearise(z, operands, needs)
        for z in iterates_backwards(runner, z0, operands, count, site.spec.config.loop_memory)
    )  # fmt: skip
    for linear in backwards:
        w, grads = linear.vjp_full(w)
        for i, (t, g) in enumerate(zip(total, grads, strict=True)):
            if t is None:
                total[i] = g
            elif g is not None:
                total[i], own[i] = t.add_(g) if own[i] else t + g, True  # the first may be a cotangent, or part of one
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
