"""A region's own iterations: run as they were, and differentiated as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .body import Linearised, Runner
from .modes import without_grad
from .site import RegionSpec

NO_ITERATIONS = -1  # in the place of a count, where 0 says that a loop was solved


@dataclass(frozen=True, eq=False)
class OwnLoop:
    """What the user's own loop gives: its result z (B, D), how many iterations it took, or NO_ITERATIONS, and whether a
    test of its own ended it before its cap did. `linears` is the body linearised at each iterate, where that was asked for."""

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
    made = k or cap or NO_ITERATIONS  # of an empty state, as many as there would have been
    return OwnLoop(z.clone() if k == 0 else z, made, passed, linears)  # an output may not share memory with an input


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The user's own iterates z_0 .. z_{count-1}, to be differentiated.

    runner   of the body
    z0       (B, D) where they begin
    operands of the body
    needs    which of them want a gradient
    count    of iterations
    memory   the option `loop_memory`
    linears  the body linearised at each iterate; where it is empty, they are computed again
    """

    runner: Runner
    z0: Tensor
    operands: Sequence[Tensor]
    needs: tuple[bool, ...]
    count: int
    memory: int | None = None
    linears: Sequence[Linearised] = ()

    def backwards(self) -> Iterator[Linearised]:
        """The body linearised at each iterate, last to first."""
        if self.linears:
            yield from reversed(self.linears)
            return
        for z in iterates_backwards(self.runner, self.z0, self.operands, self.count, self.memory):
            yield self.runner.linearise(z, self.operands, self.needs)


def loop_gradient(trajectory: Trajectory, q: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The exact gradient of the user's own loop for cotangents q (B, D): one VJP at each of its iterates, last to first. That of
    its start (B, D), and those of the operands that want one."""
    total: list[Tensor | None] = [None] * sum(trajectory.needs)
    own = [False] * len(total)
    w = q
    if trajectory.count == NO_ITERATIONS:
        return w, total
    for linear in trajectory.backwards():
        w, grads = linear.vjp_full(w)
        for i, (t, g) in enumerate(zip(total, grads, strict=True)):
            if t is None:
                total[i] = g
            elif g is not None:
                total[i], own[i] = t.add_(g) if own[i] else t + g, True  # the first may be a cotangent, or part of one
    return w, total


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
