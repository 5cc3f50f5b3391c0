"""Products with Broyden's factors, one factor at a time, in float64: what tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_inverse(S: Tensor, kappa: Sequence[float] | Tensor) -> Tensor:
    """H (D, D) in float64 of one sample: the product of I + kappa_j s_{j+1} s_j^T, newest on the left, times -I.

    Args:
        S: (n, D) stored steps.
        kappa: (n-1,) theta_j / |s_j|^2, the diagonal of C.
    """
    s = S.double()
    H = -torch.eye(s.shape[1], dtype=torch.float64)
    for j in range(s.shape[0] - 1):
        H = H + float(kappa[j]) * torch.outer(s[j + 1], s[j] @ H)
    return H


def apply_transpose_reference(S: Tensor, C: Tensor, n: Tensor, x: Tensor) -> Tensor:
    """-H^T x (B, D) in float64; S (B, M+1, D), C (B, M, M), n (B,), x (B, D) as in Factors."""
    rows = []
    for i, stored in enumerate(n.tolist()):
        if stored < 2:
            rows.append(x[i].double())
            continue
        rows.append(-dense_inverse(S[i, :stored], C[i].diagonal()[: stored - 1]).T @ x[i].double())
    return torch.stack(rows) if rows else x.double()


def multisecant_reference(z: Tensor, g: Tensor, ridge: float, ridge_far: float) -> Tensor:
    """M (D, D) in float64 of one sample from its iterates z (n+1, D) and residuals g (n+1, D), by the formula itself.

    M = I - Y^T (Y Y^T + Lambda)^-1 (S + Y), rows of S and Y over |s_k|; see :mod:`.multisecant` for Lambda.
    """
    s, y = z.double().diff(dim=0), g.double().diff(dim=0)
    eye = torch.eye(z.shape[1], dtype=torch.float64)
    norms = s.norm(dim=1, keepdim=True)
    s, y = s / norms, y / norms
    far = torch.maximum(g.double().norm(dim=1)[1:], g.double().norm(dim=1)[:-1])
    weight = (y.norm(dim=1) ** 2).clamp(min=1.0) * (ridge + ridge_far * far / far.max())
    return eye - y.T @ torch.linalg.solve(y @ y.T + weight.diag(), s + y)
