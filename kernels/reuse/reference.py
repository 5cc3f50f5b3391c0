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
