"""Ridge-regularised type-II multisecant factors from the stored steps of a Broyden solve.

Broyden's own H is of type I (it maps changes of the residual to steps, and may be wild); the type-II operator asks that
M = (I - J^T)^-1 agree with the pairs (s_k, y_k = g_{k+1} - g_k) in the least-squares sense, with a ridge Lambda on each pair:

    M v = v - Y^T (Y Y^T + Lambda)^-1 (S + Y) v            rows of S and Y divided by |s_k|

Nothing but the steps and the diagonal of C is needed: with kappa_j = C[j, j] and G = S S^T, the residual g_n is a combination
of the steps, g_n = R[n] S, with R[0] = e_0 and R[1:, 1:] = ((I + diag(kappa) triu(G[:-1, 1:]))^-1)^T, because
g_n = -H_n^-1 s_n and H_n^-1 is a product of rank-one updates in the span of the steps. Then Y = T S with
T[k] = (R[k+1] - R[k]) / |s_k|, E = T + diag(1 / |s_k|), and

    M v = v - S^T W (S v)        W = T^T (T G T^T + Lambda)^-1 E    (n x n, made once)

Lambda_k = max(1, |y_k|^2 / |s_k|^2) (0.03 + 3 e_k), e_k = max(|g_k|, |g_{k+1}|) / its largest over k: pairs from far away say
less about the Jacobian at the fixed point. NOTES.md has the measurements behind the two numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import workspace
from ..broyden.state import Factors, coefficient_width
from ..precision import without_autocast

RIDGE = 0.03
RIDGE_FAR = 3.0


@dataclass(kw_only=True, eq=False)
class Multisecant:
    """The operator M = I + S^T V^T S of each sample, V = -W^T.

    Attributes:
        S: (B, M+1, D) steps, as in :class:`~..broyden.state.Factors`.
        V: (B, M+1, coefficient_width(M+1)) compute dtype; zero where a sample has no pair. Only n rows and columns are in use.
        n: (B,) int32, number of steps stored.
        slots_written: number of slots of S that have ever been written.
        native: what an implementation remembers of the tensors above.
    """

    S: Tensor
    V: Tensor
    n: Tensor
    slots_written: int
    native: Any = None


def empty_weights(factors: Factors) -> Tensor:
    """The uninitialised V for some factors."""
    slots, C = factors.S.shape[1], factors.C
    shape = C.shape[0], slots, coefficient_width(slots)
    return workspace.empty(shape, C.dtype) if C.device.type == "cpu" else C.new_empty(shape)


@without_autocast
def gram_torch(S: Tensor, n: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, k, k) in `dtype`: S S^T of the first n rows of each sample, zero elsewhere. S (B, k, D)."""
    if S.dtype == dtype:
        G = torch.bmm(S, S.transpose(1, 2))
    else:  # low-precision factors: the products are added in `dtype`, block by block to bound the copy
        G = torch.zeros((*S.shape[:2], S.shape[1]), dtype=dtype, device=S.device)
        for block in S.split(1 << 15, 2):
            wide = block.to(dtype)
            G.baddbmm_(wide, wide.transpose(1, 2))
    used = torch.arange(S.shape[1], device=S.device) < n[:, None]
    return torch.where(used[:, :, None] & used[:, None], G, 0.0)  # select: what is not in use may be NaN


@without_autocast
def weights_from_gram(G: Tensor, C: Tensor, n: Tensor, skip: int = 0) -> Tensor:
    """W (B, k, k) in float64, from the Gram matrix (B, k, k) of the steps and the coefficients C; sync-free.

    `skip`: the first pairs of each sample that are left out (after a restart the first two are not exact).
    """
    G = G.double()
    k, device = G.shape[1], G.device
    pairs = k - 1
    index = torch.arange(pairs, device=device)
    exists = index < (n - 1)[:, None]
    kappa = torch.where(exists, C[:, :pairs, :pairs].diagonal(dim1=1, dim2=2).double(), 0.0)
    eye = torch.eye(pairs, dtype=torch.float64, device=device)
    A = eye + kappa[:, :, None] * G[:, :-1, 1:].triu()
    R = G.new_zeros(G.shape)
    R[:, 0, 0] = 1
    R[:, 1:, 1:] = torch.linalg.solve_triangular(A, eye.expand_as(A), upper=True).transpose(1, 2)
    RG = R @ G
    norms = (RG * R).sum(2).clamp_min(0).sqrt()  # |g_k|
    squares = G.diagonal(dim1=1, dim2=2)[:, :-1]
    live = exists & (index >= skip) & (squares > 0)
    inverse = torch.where(live, squares.rsqrt(), 0.0)[:, :, None]
    T = (R[:, 1:] - R[:, :-1]) * inverse
    E = T.clone()
    E.diagonal(dim1=1, dim2=2).add_(inverse[:, :, 0])
    K = ((RG[:, 1:] - RG[:, :-1]) * inverse) @ T.transpose(1, 2)
    far = torch.where(live, torch.maximum(norms[:, 1:], norms[:, :-1]), 0.0)
    far = far / far.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    diagonal = K.diagonal(dim1=1, dim2=2)
    diagonal.add_(torch.where(live, diagonal.clamp_min(1.0) * (RIDGE + RIDGE_FAR * far), 1.0))
    factor, info = torch.linalg.cholesky_ex(K)
    # Two triangular solves, not torch.cholesky_solve: that asks the device, and a graph cannot capture it.
    half = torch.linalg.solve_triangular(factor, E, upper=False)
    W = T.transpose(1, 2) @ torch.linalg.solve_triangular(factor.transpose(1, 2), half, upper=True)
    good = (info == 0) & torch.isfinite(W).all(2).all(1)
    return torch.where(good[:, None, None], W, 0.0)


def multisecant_aten(factors: Factors, skip: int = 0, G: Tensor | None = None) -> Multisecant:
    """:func:`~.dispatch.multisecant` in ATen operators; `G` is the Gram matrix where it is known already."""
    k = factors.slots_written
    V = empty_weights(factors).zero_()
    if k >= 2:
        if G is None:
            G = gram_torch(factors.S[:, :k], factors.n, factors.C.dtype)
        W = weights_from_gram(G, factors.C, factors.n, skip)
        V[:, :k, :k] = W.transpose(1, 2).neg_().to(V.dtype)
    return Multisecant(S=factors.S, V=V, n=factors.n, slots_written=k)


@without_autocast
def apply_aten(operator: Multisecant, x: Tensor) -> Tensor:
    """M x for x (B, D) in the compute dtype."""
    k = operator.slots_written
    if k < 2:
        return x.clone()
    S = operator.S[:, :k].to(x.dtype)
    d = torch.bmm(torch.bmm(x[:, None], S.transpose(1, 2)), operator.V[:, :k, :k])
    return torch.baddbmm(x[:, None], d, S)[:, 0]
