"""The shared inverse H_0 = -I + A^T Y, of rank r: what earlier batches knew of the inverse Jacobian of g(z) = f(z) - z.

Of pairs (s, y), where y is what the residual changed by along s, the r directions that the steps span most are kept, and H_0 is
the least change of -I that maps each y to its s:

    S = U diag(sigma) V^T       S <- diag(1/sigma) U_r^T S, and Y alike           by the Gram matrix S S^T and its eigenvectors
    A = (Y Y^T + ridge mean diag)^-1 (S + Y)

A solve uses P = -H_0 = I - A^T Y from the left, on the residual: Broyden with H_0 is Broyden with -I on P g (Kelley's product
form), at two thin matrix products for the whole batch. It changes how many evaluations a solve takes, and not what is solved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import on_gpu
from ..precision import without_autocast

# Rank 32 saves hardly more evaluations than 16, at twice the price, and beyond a quarter of the dimension more rank is noise. The
# ridge makes no difference between 1e-3 and 1e-1 (NOTES.md, "Factors that outlive the step").
RANK = 16
RIDGE = 1e-2

# Directions with less than this share of the largest singular value are what samples differ in.
LEAST_SHARE = 1e-3
# The largest |A| |Y| / r that is trusted: beyond it the pairs say that the Jacobian has an eigenvalue of 1.
RUNAWAY = 1e3


@dataclass(frozen=True, eq=False)
class Shared:
    """P = I - A^T Y, about (I - J)^-1 for all samples of a batch; nothing in it changes.

    A      (r, D) compute dtype
    Yt     (D, r) the transpose of Y. On a CPU contiguous: a thin product takes it at twice the speed; on a GPU Y is
    sigma  (r,) float64, on the CPU: how much of the pairs lay in each direction, for those that are added later
    """

    A: Tensor
    Yt: Tensor
    sigma: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def T(self) -> Shared:
        """P^T."""
        return Shared(self.Yt.T.contiguous(), _laid(self.A.T), self.sigma)

    def fits(self, z: Tensor) -> bool:
        """Whether it is made for states like z (B, D)."""
        return self.A.shape[1] == z.shape[1] and self.A.dtype == z.dtype and self.A.device == z.device

    @without_autocast
    def apply_(self, g: Tensor) -> Tensor:
        """P g for g (B, D), in its place."""
        return g.addmm_(self.weights(g), self.A, alpha=-1)

    def weights(self, g: Tensor) -> Tensor:
        """(B, r): Y g. Into a tensor of our own, which an autocast of the user's leaves alone."""
        return torch.mm(g, self.Yt, out=g.new_empty((g.shape[0], self.rank)))

    @without_autocast
    def pairs(self) -> tuple[Tensor, Tensor]:
        """S and Y (r, D), as they were when it was made; the rows of S are orthonormal."""
        Y = self.Yt.T
        return (_ridged(Y).to(Y) @ self.A).sub_(Y), Y


def _laid(Yt: Tensor) -> Tensor:
    return Yt if on_gpu(Yt.device) else Yt.contiguous()


def rank_for(D: int) -> int:
    """The rank for states of D elements."""
    return min(RANK, max(1, D // 4))


@without_autocast
def compress(S: Tensor, Y: Tensor, rank: int, old: Shared | None = None) -> Shared | None:
    """The shared inverse of some pairs, S and Y (P, D), and of an older one with the same weight; None where they say nothing
    that could be trusted. Beside S and Y nothing is made that has more than r rows."""
    with torch.autocast(S.device.type, enabled=False):  # the user's
        return _compress(S, Y, rank, old)


def _compress(S: Tensor, Y: Tensor, rank: int, old: Shared | None) -> Shared | None:
    gram = (S @ S.T).double().cpu()  # small: a GPU's eigensolver takes longer than the way to the CPU and back
    size = gram.diagonal().sum().sqrt()
    if not bool(size > 0) or not bool(torch.isfinite(size)) or not bool(torch.isfinite(Y).all()):
        return None
    gram /= size**2
    before: tuple[Tensor, Tensor] | None = None
    if old is not None:
        before, weights = old.pairs(), old.sigma / torch.linalg.vector_norm(old.sigma)
        mixed = (S @ before[0].T).double().cpu() * weights / size
        own = (before[0] @ before[0].T).double().cpu() * weights[:, None] * weights
        gram = torch.cat([torch.cat([gram, mixed], 1), torch.cat([mixed.T, own], 1)])
    values, vectors = torch.linalg.eigh(gram)
    kept = min(rank, int((values > LEAST_SHARE**2 * values[-1]).sum()))
    if not kept:
        return None
    sigma = values[-kept:].sqrt()
    turn = (vectors[:, -kept:] / sigma).T
    fresh = (turn[:, : len(S)] / size).to(S)
    S, Y = fresh @ S, fresh @ Y
    if before is not None:
        older = (turn[:, -len(weights) :] * weights).to(S)
        S.addmm_(older, before[0])
        Y.addmm_(older, before[1])
    inverse, info = torch.linalg.inv_ex(_ridged(Y))
    A = inverse.to(S) @ S.add_(Y)
    bound = torch.linalg.vector_norm(A) * torch.linalg.vector_norm(Y) / kept
    return Shared(A, _laid(Y.T), sigma) if int(info) == 0 and bool(bound <= RUNAWAY) else None  # NaN is not


def _ridged(Y: Tensor) -> Tensor:
    """(r, r) float64 on the CPU: Y Y^T with the ridge."""
    K = (Y @ Y.T).double().cpu()
    K.diagonal().add_(RIDGE * K.diagonal().mean() + torch.finfo(torch.float64).tiny)
    return K
