"""A region's own iterations: run as they were, and differentiated as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deq_compile.config import Config

from . import records
from .body import Linearised, Runner
from .layout import Layout
from .modes import without_grad
from .site import RegionSpec


@dataclass(frozen=True, eq=False)
class OwnLoop:
    """What the user's own loop gives: its result z (B, D), how many iterations it took, and whether a test of its own ended it
    before its cap did. `linears` is the body linearised at each iterate, where that was asked for."""

    z: Tensor
    iterations: int
    passed: bool = False
    linears: Sequence[Linearised] = ()


@without_grad
def own_loop(
    spec: RegionSpec,
    body: Callable[[Tensor], Any],
    z0: Tensor,
    stop: Callable[[Tensor, Tensor], bool] | None,
    *,
    linearise: bool = False,
) -> OwnLoop:
    """The user's own loop from z0 (B, D): N iterations, or until one of its tests or its cap ends it. With `linearise` the body
    gives itself linearised beside its value (:meth:`~.body.Runner.evaluate_and_linearise`).

    Where a test ends it at z, f(z) is returned: a loop that returns z itself has said that it does not tell them apart, but for
    values that are not finite, which are in f(z) alone.
    """
    cap = spec.own_loop_cap
    assert cap is not None
    z, k, passed = z0, 0, False
    linears: list[Linearised] = []
    while z.numel() and k < cap and not passed:
        f = body(z)
        if linearise:
            f, linear = f
            linears.append(linear)
        passed = stop is not None and stop(z, f)
        z, k = f, k + 1
    return OwnLoop(z.clone() if k == 0 else z, k or cap, passed, linears)  # an output may not share memory with an input


def loop_gradient(
    layout: Layout,
    runner: Runner,
    z0: Tensor,
    q: Tensor,
    operands: Sequence[Tensor],
    needs: tuple[bool, ...],
    serial: int,
    count: int,
    config: Config,
    linears: Sequence[Linearised] = (),
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The exact gradient of a loop of `count` iterations: one VJP at each of its iterates, last to first. `linears` is the body
    linearised at each; where it is empty, they are computed again."""
    total: list[Tensor | None] = [None] * sum(needs)
    own = [False] * len(total)
    w = q
    backwards = reversed(linears) if linears else (
        runner.linearise(z, operands, needs)
        for z in iterates_backwards(runner, z0, operands, count, config.loop_memory)
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
