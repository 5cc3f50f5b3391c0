"""The exact gradient of a reversible iteration (solvers/reversible.py): its terms are computed back from the last two.

Steps back carry roundings on, so nothing is taken on trust. Each stretch between two pairs that are known exactly, the start
among them, is walked back to the earlier pair; what is found there has to be that pair. Where it is not, the stretch is made
again from its beginning, and if it does not end where it did, f is no function of its inputs and there is no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .body import Runner
from .modes import without_grad
from .solvers.reversible import DRIFT, DRIFT_COARSE, Pair, ReversibleProgress

# How far a pair that was walked back to may be from the one that is known, in units of what roundings are expected to come to,
# and how far a stretch that is made again may end from where it did, where a device adds in another order.
MARGIN, AGAIN = 10.0, 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Trail:
    """A reversible iteration that has ended: `end`, its last two terms, `kept`, pairs on the way, and `moves` (B,), the steps of
    each sample."""

    end: Pair
    kept: Sequence[Pair]
    moves: Tensor
    relaxation: float

    @staticmethod
    def of(progress: ReversibleProgress) -> Trail:
        return Trail(progress.pair, tuple(progress.kept), progress.moves, progress.relaxation)


@dataclasses.dataclass
class Reversal:
    """The gradient of a trail, and what it took.

    start     (B, D) of the initial state
    operands  of those that want one
    products, evaluations  VJPs and evaluations of the body
    stretches, again  how many there were, and how many had to be made again from their beginning
    """

    start: Tensor
    operands: list[Tensor | None]
    products: int = 0
    evaluations: int = 0
    stretches: int = 0
    again: int = 0

    @property
    def message(self) -> str:
        said = "the exact gradient of the iteration's own steps"
        return (
            said if not self.again else f"{said}; {self.again} of {self.stretches} stretches were not reversible, and made again"
        )


@without_grad
def reversed_gradient(
    trail: Trail,
    z0: Tensor,
    q: Tensor,
    runner: Runner,
    operands: Sequence[Tensor],
    needs: tuple[bool, ...],
    attached: bool = False,
) -> Reversal:
    """The exact gradient of an iteration for cotangents q of its last term.

    Args:
        trail: of the iteration.
        z0: (B, D) where it began, in the dtype that the body is given.
        q: (B, D) cotangents; of f at the last term where it is `attached`.
        runner, operands: the body, and what it reads.
        needs: which of the operands want a gradient.

    Raises:
        RuntimeError: the body gave other values than in the forward.
    """
    return _Walk(trail, z0, q.dtype, runner, operands, needs).back(q, attached)


class _Walk:
    def __init__(
        self, trail: Trail, z0: Tensor, dtype: torch.dtype, runner: Runner, operands: Sequence[Tensor], needs: tuple[bool, ...]
    ) -> None:
        self.trail, self.dtype, self.runner, self.operands, self.needs = trail, dtype, runner, operands, needs
        start = z0.to(torch.float64)
        self.pairs = [Pair(0, start, start), *trail.kept, trail.end]
        self.near = MARGIN * (DRIFT if dtype == torch.float64 else DRIFT_COARSE)
        self.always = int(trail.moves.min()) if trail.moves.numel() else 0  # steps that all samples have made
        self.same: bool | None = None  # whether the linearised body gives the value of the plain one, to the last bit
        self.found = Reversal(torch.zeros_like(start), [None] * sum(needs))

    def back(self, q: Tensor, attached: bool) -> Reversal:
        found, g = self.found, q.to(torch.float64)
        if attached:
            g = self._product(self.trail.end.now, g)[1]
        cotangents = g, torch.zeros_like(g)
        for first, last in zip(reversed(self.pairs[:-1]), reversed(self.pairs[1:]), strict=True):
            if last.evaluations > first.evaluations:
                cotangents = self._stretch(first, last, cotangents)
        found.start = (cotangents[0] + cotangents[1]).to(self.dtype)
        return found

    def _stretch(self, first: Pair, last: Pair, cotangents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cotangents of a pair, from those of the next one; the operands' gradients are added to what is found."""
        self.found.stretches += 1
        before = list(self.found.operands)
        there, reached = self._walk(first, last, cotangents, None)
        if _apart(reached, first, last) <= self.near:
            return there
        self.found.again += 1
        self.found.operands = before
        return self._walk(first, last, cotangents, self._forwards(first, last))[0]

    def _walk(
        self, first: Pair, last: Pair, cotangents: tuple[Tensor, Tensor], points: list[Tensor] | None
    ) -> tuple[tuple[Tensor, Tensor], Pair]:
        """The cotangents of `first`, and the pair that was found there. With `points` its terms are known, and not computed."""
        b, (now, before), (g, h) = self.trail.relaxation, (last.now, last.before), cotangents
        for j in reversed(range(first.evaluations, last.evaluations)):
            moved = None if j < self.always else (self.trail.moves > j)[:, None]
            along = b * g if moved is None else (b * g).masked_fill(~moved, 0.0)
            f, product = self._product(before if points is None else points[j - first.evaluations], along)
            g, h = _where(moved, (h + product, (1 - b) * g), (g, h))
            if points is None:
                now, before = _where(moved, (before, (now - b * f) / (1 - b)), (now, before))
        return (g, h), Pair(first.evaluations, now, before)

    def _product(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """f(u) and J^T w in float64, the operands' gradients added up. (B, D) each."""
        found = self.found
        u = u.to(self.dtype)
        value, linear = self.runner.evaluate_and_linearise(u, self.operands, self.needs)
        found.evaluations += 1
        if not self.same:  # compiled with what it saves a body may add in another order; its value has to be the forward's
            plain = self.runner.apply(u, self.operands)
            found.evaluations += 1
            self.same = torch.equal(plain, value) if self.same is None else False
            value = plain
        product, grads = linear.vjp_full(w.to(self.dtype))
        found.products += 1
        found.operands = [g if t is None else t if g is None else t + g for t, g in zip(found.operands, grads, strict=True)]
        return value.to(torch.float64), product.to(torch.float64)

    def _forwards(self, first: Pair, last: Pair) -> list[Tensor]:
        """Where f was evaluated between two pairs, by the same steps once more."""
        b, now, before, points = self.trail.relaxation, first.now, first.before, []
        for j in range(first.evaluations, last.evaluations):
            points.append(now.to(self.dtype))
            f = self.runner.apply(points[-1], self.operands).to(torch.float64)
            moved = None if j < self.always else (self.trail.moves > j)[:, None]
            now, before = _where(moved, (torch.add(before * (1 - b), f, alpha=b), now), (now, before))
        self.found.evaluations += len(points)
        if not _apart(Pair(last.evaluations, now, before), last, last) <= AGAIN:
            raise RuntimeError(
                "solver='reversible': expected f to give the same values in the backward as in the forward, got others: it draws "
                "random numbers, keeps a state, or something that it reads has been written to. Fix: an f that depends on its "
                "inputs alone (a mask of dropout drawn once, outside of it), or backward='exact' with another solver"
            )
        return points


def _where(moved: Tensor | None, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return a if moved is None else (torch.where(moved, a[0], b[0]), torch.where(moved, a[1], b[1]))


def _apart(a: Pair, b: Pair, size: Pair) -> float:
    """Max over samples of |a - b| relative to the larger of b and `size`; what is equal, NaN included, is not apart."""
    if not a.now.numel():
        return 0.0
    gaps = []
    for mine, theirs, other in ((a.now, b.now, size.now), (a.before, b.before, size.before)):
        same = torch.isclose(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True)
        gap = torch.linalg.vector_norm((mine - theirs).masked_fill(same, 0.0), dim=1)
        scale = torch.maximum(torch.linalg.vector_norm(theirs, dim=1), torch.linalg.vector_norm(other, dim=1))
        gaps.append((gap / scale).masked_fill(gap == 0, 0.0))
    return float(torch.stack(gaps).max())
