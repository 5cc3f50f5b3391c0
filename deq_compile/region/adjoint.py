"""The backward solve: reuse the forward's factors, and certify the result.

The implicit gradient needs the adjoint w = q + J^T w of the cotangent q. One vector-Jacobian product (VJP) at an
estimate w gives the parameter gradients and J^T w, hence the adjoint residual r = q + J^T w - w: no gradient leaves
without its residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deq_compile.kernels.broyden import (
    MAX_ITER,
    NONFINITE,
    BroydenState,
    Factors,
    advance,
    new_state,
    step_residual,
)
from deq_compile.kernels.reuse import adjoint_residual, apply_transpose
from deq_compile.region.forward import FLOOR_EPS
from deq_compile.region.status import AdjointStatus

# An estimate has blown up when its residual is this many times the best one known, that of w = 0 (which is 1) included.
# The last estimate is not given up for less: the lowest residual is not the lowest error (evidence, section 2).
BLOWN_UP = 10.0

# Steps of the adjoint iteration that are stored before it restarts; its own default cap is lower.
MEMORY = 40

VJP = Callable[[Tensor], Tensor]
VJPFull = Callable[[Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True, eq=False)
class AdjointSolution:
    """Outcome of :func:`solve_adjoint`.

    Attributes:
        w: (B, D) the adjoint estimate.
        payload: what ``vjp_full`` returned beside J^T w at this very ``w``.
        vjps: VJPs computed, both kinds.
        needed: the VJP at which the iteration ended; what to pass as ``expected`` next time.
        residual: |q + J^T w - w| / |q| over the whole batch, 0 where q = 0.
        residuals: (B,) the same of each sample.
        status: how it ended.
    """

    w: Tensor
    payload: Any
    vjps: int
    needed: int
    residual: float
    residuals: Tensor
    status: AdjointStatus


@torch.no_grad()
def solve_adjoint(
    vjp: VJP,
    vjp_full: VJPFull,
    q: Tensor,
    state: Factors | None,
    *,
    tol: float,
    max_iter: int = 20,
    expected: int | None = None,
    body_eps: float | None = None,
) -> AdjointSolution:
    """Solve w = q + J^T w from w_0 = -H^T q, by Broyden's method with H_0 = H^T.

    The iteration stops when the batch's relative residual is at most ``tol`` (the gradient sums over samples). Samples
    that have reached ``tol`` by themselves are frozen. ``tol=inf`` is one raw reuse, the method of Nguyen & Mauch
    (arXiv 2304.11663): w = -H^T q and one VJP. Otherwise the last estimate is returned, but for samples where it is not
    finite or has blown up: those get their best one, or their cotangent.

    Args:
        vjp: w (B, D) -> J^T w (B, D).
        vjp_full: w (B, D) -> (J^T w, payload); dearer than ``vjp``, so called as seldom as possible.
        q: (B, D) cotangents, float32 or float64; left as it is. A sample with q = 0 gets w = 0.
        state: factors of the forward solve; None means H = -I, so that w_0 = q.
        tol: relative adjoint residual to reach.
        max_iter: cap on VJPs, at least 1; returning another estimate than the last takes one more.
        expected: the VJP at which the iteration is expected to end, where ``vjp_full`` is called outright; None: 1.

        body_eps: eps of the precision that the VJPs compute in; None is that of ``q``'s dtype.

    Raises:
        ValueError: ``max_iter`` < 1.
    """
    if max_iter < 1:
        raise ValueError(f"expected max_iter >= 1, got {max_iter}")
    reuse = (lambda x: apply_transpose(state, x)) if state is not None else torch.clone
    norms = _Norms(q)
    if math.isinf(tol):
        return _one_vjp(vjp_full, reuse(q), norms)
    # z_best starts as q: what a sample falls back to if it never has a finite residual.
    floor = FLOOR_EPS * (torch.finfo(q.dtype).eps if body_eps is None else body_eps)
    adjoint = new_state(q, min(max_iter, MEMORY), tol=tol, floor=floor)
    # The step from w = 0, whose residual q needs no VJP, is -H^T q and the first that is stored.
    w = torch.zeros_like(q, memory_format=torch.contiguous_format)
    advance(adjoint, w, reuse(q))
    return _refine(vjp, vjp_full, norms, reuse, adjoint, w, max_iter, 1 if expected is None else expected)


def jacobian_free(vjp_full: VJPFull, q: Tensor) -> AdjointSolution:
    """The Jacobian-free gradient, w = q (Fung et al., arXiv 2103.12803): one VJP, residual reported. q is (B, D)."""
    return _one_vjp(vjp_full, q.clone(), _Norms(q))


class _Norms:
    """The cotangents, and residuals relative to them."""

    def __init__(self, q: Tensor) -> None:
        self.q = q
        self.norms = torch.linalg.vector_norm(q, dim=1)
        self.batch = float(torch.linalg.vector_norm(self.norms))

    def residual(self, w: Tensor, jw: Tensor) -> tuple[Tensor, Tensor, float]:
        """r = q + J^T w - w (B, D), its relative norm of each sample (B,), and that of the batch."""
        r, residuals, batch = adjoint_residual(self.q, jw, w, self.norms)
        return r, residuals, batch / self.batch if batch else 0.0


def _one_vjp(vjp_full: VJPFull, w: Tensor, norms: _Norms) -> AdjointSolution:
    jw, payload = vjp_full(w)
    _, residuals, batch = norms.residual(w, jw)
    status = AdjointStatus.CONVERGED if math.isfinite(batch) else AdjointStatus.NONFINITE
    return AdjointSolution(w, payload, 1, 1, batch, residuals, status)


def _refine(
    vjp: VJP,
    vjp_full: VJPFull,
    norms: _Norms,
    reuse: Callable[[Tensor], Tensor],
    adjoint: BroydenState,
    w: Tensor,
    max_iter: int,
    expected: int,
) -> AdjointSolution:
    certified: AdjointSolution | None = None  # of the last call of vjp_full
    needed = 0
    while True:
        needed += 1
        last = needed == max_iter
        if last or needed == expected:
            jw, payload = vjp_full(w)
            r, residuals, batch = norms.residual(w, jw)
            certified = AdjointSolution(w.clone(), payload, needed, needed, batch, residuals, AdjointStatus.CONVERGED)
        else:
            r, residuals, batch = norms.residual(w, vjp(w))
        if batch <= adjoint.tol:
            chosen, status = w, AdjointStatus.CONVERGED
            break
        step_residual(adjoint, w, r if last else reuse(r), residuals, last=last)
        if not adjoint.running:
            chosen, status = _choose(adjoint, norms.q, w, residuals)
            break
    if certified is not None and torch.equal(certified.w, chosen):
        found = replace(certified, vjps=needed, needed=needed)
    else:
        jw, payload = vjp_full(chosen)
        _, residuals, batch = norms.residual(chosen, jw)
        found = AdjointSolution(chosen, payload, needed + 1, needed, batch, residuals, status)
    return replace(found, status=status if math.isfinite(found.residual) else AdjointStatus.NONFINITE)


def _choose(adjoint: BroydenState, q: Tensor, w: Tensor, residuals: Tensor) -> tuple[Tensor, AdjointStatus]:
    """The estimate to return where ``tol`` was missed: ``w``, but for samples that failed or blew up."""
    # Below the tolerance or the floor is good, however good the best was. Written so that NaN counts as blown up.
    limit = (BLOWN_UP * adjoint.best.clamp(max=1.0)).clamp(min=max(adjoint.tol, adjoint.floor))
    blown = ~(residuals <= limit)
    # Samples that failed have been put back to their best estimate, or to q.
    usable = adjoint.best <= BLOWN_UP
    replaced = blown | (adjoint.done == NONFINITE)
    if replaced.any():
        fallback = torch.where(usable[:, None], adjoint.z_best, q)
        chosen = torch.where(blown[:, None], fallback, w)
        lost = bool((replaced & ~usable).any())
        return chosen, AdjointStatus.FALLBACK_COTANGENT if lost else AdjointStatus.FALLBACK_BEST
    capped = bool((adjoint.done == MAX_ITER).any())
    return w, AdjointStatus.MAX_ITER if capped else AdjointStatus.FLOOR
