"""The adjoint iteration in ATen operators: any device, float32 or float64; all samples in lockstep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..iteration import RUNNING, observe
from ..precision import without_autocast
from ..reuse.multisecant import Multisecant, apply_aten
from .state import DEPENDENT_EPS, GcrState


@without_autocast
def new_aten_state(
    q: Tensor, operator: Multisecant | None, memory: int, progress: dict[str, Any], w: Tensor | None = None
) -> GcrState:
    """A state before its first VJP; `progress` are the fields of Progress. `w` is M q where it is known already."""
    B, D = q.shape
    norms = torch.linalg.vector_norm(q, dim=1)
    if w is None:
        w = q.clone() if operator is None else apply_aten(operator, q)
    return GcrState(
        q=q, norms=norms, batch_norm=float(torch.linalg.vector_norm(norms)), operator=operator,
        x=torch.zeros_like(q), r=q.clone(), w=w, basis=q.new_empty((B, 2, memory, D)),
        n=torch.zeros(B, dtype=torch.int32, device=q.device),
        true_residual=torch.empty_like(q), residuals=torch.zeros_like(norms), **progress,
    )  # fmt: skip


@without_autocast
def move(state: GcrState, jw: Tensor, last: bool) -> None:
    """:func:`~.dispatch.move`."""
    s = state
    torch.add(s.q, jw, out=s.true_residual).sub_(s.w)
    norms = torch.linalg.vector_norm(s.true_residual, dim=1).masked_fill_(s.norms == 0, 0.0)
    torch.div(norms, s.norms.masked_fill(s.norms == 0, 1.0), out=s.residuals)
    batch = float(torch.linalg.vector_norm(norms))
    s.batch = batch / s.batch_norm if s.batch_norm else 0.0
    s.converged = s.batch <= s.tol
    if s.converged:
        s.evaluations += 1
        return
    observe(s, s.w, s.residuals, last=last)
    if s.active:
        _extend(s)


def _extend(s: GcrState) -> None:
    if s.count == s.memory:
        s.count = 0
    k = s.count
    images, directions = s.basis[:, 0, :k], s.basis[:, 1, :k]
    y, z = s.r - s.true_residual, s.w - s.x
    before = torch.linalg.vector_norm(y, dim=1)
    for _ in range(2 if k else 0):  # classical Gram-Schmidt, twice
        h = torch.bmm(y[:, None], images.transpose(1, 2))
        y = torch.baddbmm(y[:, None], h, images, alpha=-1)[:, 0]
        z = torch.baddbmm(z[:, None], h, directions, alpha=-1)[:, 0]
    norm = torch.linalg.vector_norm(y, dim=1)
    running = s.done == RUNNING
    fresh = running & (norm > DEPENDENT_EPS * torch.finfo(y.dtype).eps * before) & torch.isfinite(norm.reciprocal())
    again = running & ~fresh  # nothing new: begin again where the residual is known
    inverse = torch.where(fresh, norm.reciprocal(), 0.0)[:, None]
    # Select, never multiply by a mask: 0 * NaN is NaN. Zero vectors in the basis change nothing.
    y, z = (torch.where(fresh[:, None], v * inverse, 0.0) for v in (y, z))
    alpha = (y * s.r).sum(1, keepdim=True)
    s.x.addcmul_(alpha, z)
    s.r.addcmul_(alpha, y, value=-1)
    s.basis[:, 0, k], s.basis[:, 1, k] = y, z
    s.count = k + 1
    s.n.add_(fresh.int())
    if k == 0:
        s.n.copy_(torch.where(running, fresh.int(), s.n))
    if bool(again.any()):
        s.basis[:, :, : s.count].masked_fill_(again[:, None, None, None], 0.0)
        s.n.masked_fill_(again, 0)
        torch.where(again[:, None], s.w, s.x, out=s.x)
        torch.where(again[:, None], s.true_residual, s.r, out=s.r)
    ahead = s.x + (s.r if s.operator is None else apply_aten(s.operator, s.r))
    torch.where(running[:, None], ahead, s.w, out=s.w)
