"""Textbook good Broyden with a dense inverse, one sample, in float64: what tests compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_broyden(f: Callable[[Tensor], Tensor], z0: Tensor, steps: int, eta: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """Good Broyden on g(z) = f(z) - z with H_0 = -I and full steps (Broyden 1965; guard of Powell 1970).

    Args:
        f: body of one sample, (D,) -> (D,).
        z0: (D,) initial iterate; computed with in float64.
        steps: number of steps to take; there are steps - 1 updates of H between them.
        eta: Powell's guard; 0 is the textbook's update. An update with s = 0 is skipped.

    Returns:
        The iterates z_0 .. z_steps, each (D,), and the H (D, D) with which the last step was taken.
    """
    z = z0.double()
    H = -torch.eye(z.shape[0], dtype=torch.float64)
    g = f(z) - z
    iterates = [z]
    for k in range(steps):
        s = -H @ g
        z = z + s
        g_old, g = g, f(z) - z
        iterates.append(z)
        if k < steps - 1:
            H = _updated(H, s, g - g_old, eta)
    return iterates, H


def _updated(H: Tensor, s: Tensor, y: Tensor, eta: float) -> Tensor:
    """B+ = B + theta (y - B s) s^T / |s|^2, inverted by Sherman-Morrison."""
    sigma = s @ s
    if sigma == 0:
        return H
    Hy = H @ y
    gamma = (s @ Hy) / sigma
    theta = torch.ones_like(gamma)
    if gamma.abs() < eta:
        theta = (1 - (-eta if gamma < 0 else eta)) / (1 - gamma)
    return H + theta * torch.outer(s - Hy, s @ H) / ((1 - theta) * sigma + theta * (s @ Hy))
