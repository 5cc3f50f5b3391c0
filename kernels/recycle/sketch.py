"""Secant pairs of one batch as random sign sums over its samples: a few rows an iteration, whatever the size of the batch.

What samples have in common adds up in such a sum, and what they differ in does not. Sums of one batch are fewer than its pairs by
the batch's size, and, added to those of earlier batches, do as well (NOTES.md, "Factors that outlive the step").
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import workspace
from ..device import on_gpu
from ..precision import without_autocast

# Rows of a sketch: what the Gram matrix is made of.
ROWS = 64
LEAST_SUMS, MOST_SUMS = 2, 8
# A step between iterates that agree to so many of their units has no digits that say anything of the Jacobian; of the units that
# the body computes in, where those are coarser.
NOISE_EPS, NOISE_BODY = 1e3, 10.0
# A pair by which the residual changes so many times as much as the iterate is a runaway's.
RUNAWAY = 1e3
# A pair counts 1 / (1 + FAR e), e being its residual against the largest of the solve: far from the fixed point the Jacobian is
# another, of a normalised body that starts at 0 above all.
FAR = 3.0


def sums_for(pairs: int) -> int:
    """Sums an iteration for a solve of so many pairs a sample."""
    return max(LEAST_SUMS, min(MOST_SUMS, ROWS // max(pairs, 1)))


class Sketch:
    """Sums of secant pairs, each pair divided by the length of its step.

    sums   of each iteration
    pairs  a sample that are expected: what room is made for at first
    seed   of the signs: equal seeds, equal sums
    body_eps  of the precision that the body computes in; None: that of the state's dtype
    """

    def __init__(self, sums: int, pairs: int, seed: int, body_eps: float | None = None) -> None:
        self.body_eps = body_eps or 0.0
        self.sums, self.room = sums, sums * max(pairs, 1)
        self.generator = torch.Generator().manual_seed(seed)
        self.count = 0
        self._rows: Tensor | None = None  # (2, room, D): S and Y
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._largest: Tensor | None = None

    def note(self, z: Tensor, g: Tensor) -> None:
        """Take in the iterates z and residuals g = f(z) - z of a solve, both (B, D), before z moves."""
        norm = torch.linalg.vector_norm(g, dim=1)
        self._largest = norm if self._largest is None else torch.fmax(norm, self._largest)
        if self._last is None:
            before, g_before = _like(z), _like(g)
        else:
            before, g_before, norm_before = self._last
            far = torch.maximum(norm, norm_before) / self._largest
            least = max(NOISE_EPS * torch.finfo(z.dtype).eps, NOISE_BODY * self.body_eps) * torch.linalg.vector_norm(
                before, dim=1
            )
            # In the place of what is not needed any more: new tensors of this size would be faulted in.
            self.add(torch.sub(z, before, out=before), torch.sub(g, g_before, out=g_before), far, least)
        self._last = before.copy_(z), g_before.copy_(g), norm

    def take(self, basis: Tensor, count: Tensor) -> None:
        """Take in the basis (B, 2, m, D) that the adjoint iteration leaves: images A p and directions p with A = I - J^T, of
        which each sample holds the first `count` (B,)."""
        for j in range(int(count.max()) if count.numel() else 0):
            p, image, there = basis[:, 1, j], basis[:, 0, j], count > j
            if on_gpu(p.device) or not bool(there.all()):  # what is not held may be anything
                p, image = p.masked_fill(~there[:, None], 0.0), image.masked_fill(~there[:, None], 0.0)
            self.add(p, image, negative=True)

    @without_autocast
    def add(
        self, S: Tensor, Y: Tensor, far: Tensor | None = None, least: Tensor | None = None, *, negative: bool = False
    ) -> None:
        """Add the pairs of one iteration, S and Y (B, D); those that are not finite, run away, or are no longer than `least` are
        left out. `far` (B,) weighs them. `negative`: it is -Y that is given."""
        lengths, changes = torch.linalg.vector_norm(S, dim=1), torch.linalg.vector_norm(Y, dim=1)
        floor = torch.full_like(lengths, torch.finfo(S.dtype).tiny)
        good = (lengths > (floor if least is None else torch.maximum(least, floor))) & (changes <= RUNAWAY * lengths)
        good &= torch.isfinite(lengths)
        weights = 1 / lengths if far is None else 1 / (lengths * (1 + FAR * far))
        if on_gpu(S.device) or not bool(good.all()):  # a device is asked nothing
            S, Y = S.masked_fill(~good[:, None], 0.0), Y.masked_fill(~good[:, None], 0.0)
            weights = weights.masked_fill(~good, 0.0)
        signs = torch.randint(0, 2, (self.sums, S.shape[0]), generator=self.generator).to(S.dtype).mul_(2).sub_(1)
        signs = signs.to(S.device) * weights
        rows = self._room_for(S)
        torch.mm(signs, S, out=rows[0, self.count : self.count + self.sums])
        torch.mm(signs.neg_() if negative else signs, Y, out=rows[1, self.count : self.count + self.sums])
        self.count += self.sums

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """S and Y (P, D); None where there is no pair."""
        self._last = None
        return None if self._rows is None else (self._rows[0, : self.count], self._rows[1, : self.count])

    def _room_for(self, S: Tensor) -> Tensor:
        if self._rows is None:
            self._rows = _empty((2, self.room, S.shape[1]), S)
        elif self.count + self.sums > self.room:
            before, self.room = self._rows, 2 * self.room
            self._rows = _empty((2, self.room, S.shape[1]), S)
            self._rows[:, : self.count] = before[:, : self.count]
        return self._rows


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return workspace.empty(shape, like.dtype) if like.device.type == "cpu" else like.new_empty(shape)


def _like(z: Tensor) -> Tensor:
    return _empty(tuple(z.shape), z)
