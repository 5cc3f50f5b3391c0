"""Broyden's step on buffers of one size for all iterations, without an in-place write: what stands in a graph's own loop.

The algebra of aten.py, where slots that hold no step yet are zero and so add nothing to any product. A graph that has been
exported runs this where nobody has this package.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..iteration import RUNNING
from ..precision import without_autocast
from .aten import _guard

ETA = 0.1  # Powell's guard, as `region.solvers.Problem.eta`


class Steps(NamedTuple):
    """S      (B, M+1, D) the steps, zero where there is none yet
    C      (B, M, M) as in aten.py
    last   (B, D) the step that was made last
    stored () int64, how many
    """

    S: Tensor
    C: Tensor
    last: Tensor
    stored: Tensor

    @staticmethod
    def none(z0: Tensor, memory: int) -> Steps:
        """Before the first step from z0 (B, D), with room for `memory` updates."""
        rows, width = z0.shape
        empty = z0.new_zeros((rows, memory + 1, width)), z0.new_zeros((rows, memory, memory)), torch.zeros_like(z0)
        return Steps(*empty, torch.zeros((), dtype=torch.int64, device=z0.device))


@without_autocast
def advance(steps: Steps, z: Tensor, g: Tensor, done: Tensor) -> tuple[Steps, Tensor]:
    """One step from ``z`` with residual ``g``, both (B, D), for the samples that ``done`` (B,) says still run: (steps, z).

    When the memory is full the last step is kept, as in aten.py. Samples that have stopped keep their iterate and no factors:
    nothing asks for these afterwards.
    """
    S, C, last, n = steps
    memory = C.shape[1]
    r, a = torch.bmm(torch.stack((last, g), 1), S.transpose(1, 2)).split(1, 1)  # (B, 1, M+1): s_{n-1} . s_j and g . s_j
    sigma, r_next = (last * last).sum(1)[:, None, None], r[:, :, 1:]
    minus_c = torch.bmm(a[:, :, :memory], C.transpose(1, 2))
    minus_tau = (last * g).sum(1)[:, None, None] + (minus_c * r_next).sum(2, keepdim=True)
    denominator, kappa = _guard(sigma, minus_tau, ETA)
    slot, row = torch.arange(memory + 1, device=z.device), torch.arange(memory, device=z.device)
    full = n > memory
    newest = (row == torch.where(full, 0, n - 1)).to(C.dtype)
    p = torch.where(n > 0, (g + torch.bmm(minus_c, S[:, 1:])[:, 0]) / denominator[:, 0], g)
    products = torch.where(full, 0.0, torch.bmm(r_next, C))
    new_row = ((products + newest) * kappa).nan_to_num(0.0, 0.0, 0.0)
    running = (done == RUNNING)[:, None]
    p = torch.where(running, p, 0.0)
    S = torch.where(full, torch.where((slot == 0)[:, None], last[:, None], 0.0), S)
    C = torch.where(full, 0.0, C)
    n = torch.where(full, 1, n)
    S = torch.where((slot == n)[:, None], p[:, None], S)
    C = torch.where((row == n - 1)[:, None], new_row, C)
    return Steps(S, C, p, n + 1), z + p
