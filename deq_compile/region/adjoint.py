"""The backward solve: reuse what the forward learnt of the Jacobian, and certify the result.

The implicit gradient needs the adjoint w = q + J^T w of the cotangent q. One vector-Jacobian product (VJP) at an
estimate w gives the parameter gradients and J^T w, hence the adjoint residual r = q + J^T w - w: no gradient leaves
without its residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.gcr import GcrState, move, new_state
from deq_compile.kernels.iteration import MAX_ITER, NONFINITE
from deq_compile.kernels.recycle import Shared, Sketch
from deq_compile.kernels.reuse import apply_transpose, multisecant
from deq_compile.region.modes import without_grad
from deq_compile.region.solvers import FLOOR_EPS
from deq_compile.region.status import AdjointStatus

# An estimate has blown up when its residual is this many times the best one known, that of w = 0 (which is 1) included.
# The last estimate is not given up for less: the lowest residual is not the lowest error.
BLOWN_UP = 10.0

# Pairs of the adjoint iteration that are stored before its basis is dropped.
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
        reused: whether the forward's factors had a part in it.
        recycled: whether the shared inverse of earlier batches had.
        captured: whether a captured graph gave it.
        error: estimate of |w - w*| / |w| over the batch, where it was asked for; see :func:`estimated_error`.
    """

    w: Tensor
    payload: Any
    vjps: int
    needed: int
    residual: float
    residuals: Tensor
    status: AdjointStatus
    reused: bool = False
    recycled: bool = False
    captured: bool = False
    error: float | None = None

    def after(self, vjps: int) -> AdjointSolution:
        """The same, with the VJPs that led to ``w`` counted in."""
        return replace(self, vjps=self.vjps + vjps, needed=vjps)


@dataclass(frozen=True)
class AdjointProblem:
    """What is asked of the adjoint iteration.

    Attributes:
        tol: relative adjoint residual to reach; inf: one raw reuse.
        max_iter: cap on VJPs, at least 1; returning another estimate than the last takes one more.
        expected: the VJP at which the iteration is expected to end, where ``vjp_full`` is called outright, and that
            memory is made for; None: 1, and not known.
        body_eps: eps of the precision that the VJPs compute in; None is that of the cotangent's dtype.
        skip: pairs of the factors that are left out, oldest first; see :func:`deq_compile.kernels.reuse.multisecant`.
        watched: whether a device may be asked how far it is. False: ``max_iter`` VJPs and one more, whatever they come to; the
            batch's residual is not known (NaN), and the status says nothing.
        estimate: whether to estimate the error of w too.
        shared: about (I - J^T)^-1 for all samples, which preconditions where there are no factors.
        sketch: what takes in the iteration's own pairs when it has ended.

    Raises:
        ValueError: ``max_iter`` < 1.
    """

    tol: float
    max_iter: int = 20
    expected: int | None = None
    body_eps: float | None = None
    skip: int = 0
    watched: bool = True
    estimate: bool = False
    shared: Shared | None = None
    sketch: Sketch | None = None

    def __post_init__(self) -> None:
        if self.max_iter < 1:
            raise ValueError(f"expected max_iter >= 1, got {self.max_iter}")

    def floor(self, dtype: torch.dtype) -> float:
        """Relative residual below which stagnation counts as having converged."""
        return FLOOR_EPS * (torch.finfo(dtype).eps if self.body_eps is None else self.body_eps)


@without_grad
def solve_adjoint(
    vjp: VJP, vjp_full: VJPFull, q: Tensor, factors: Factors | None, problem: AdjointProblem | None = None, **settings: Any
) -> AdjointSolution:
    """Solve w = q + J^T w by generalised conjugate residuals, preconditioned with the forward solve's type-II factors.

    The iteration (:mod:`deq_compile.kernels.gcr`) starts at w_0 = M q and takes every VJP at an estimate that may be returned. It
    stops when the batch's relative residual is at most ``tol`` (the gradient sums over samples). Samples that have reached
    ``tol`` by themselves are frozen. ``tol=inf`` is one raw reuse, the method of Nguyen & Mauch (arXiv 2304.11663):
    w = -H^T q and one VJP. Otherwise the last estimate is returned, but for samples where it is not finite or has blown up:
    those get their best one, or their cotangent.

    Args:
        vjp: w (B, D) -> J^T w (B, D).
        vjp_full: w (B, D) -> (J^T w, payload); dearer than ``vjp``, so called as seldom as possible.
        q: (B, D) cotangents, float32 or float64; left as it is. A sample with q = 0 gets w = 0.
        factors: of the forward solve; None means none: w_0 = q.
        problem: tolerance and cap; None: `settings`, which are the fields of an :class:`AdjointProblem`.
    """
    problem = problem or AdjointProblem(**settings)
    if math.isinf(problem.tol):
        found = _one_vjp(vjp_full, _raw(factors, q), q)
        return replace(found, reused=factors is not None)
    adjoint = begin(q, factors, problem, problem.expected)
    if not problem.watched:
        return _unwatched(vjp, vjp_full, adjoint, problem.max_iter)
    found = _refine(vjp, vjp_full, adjoint, problem.max_iter, 1 if problem.expected is None else problem.expected)
    if problem.sketch is not None:
        problem.sketch.take(adjoint.basis[..., : q.shape[1]], adjoint.n)
    error = estimated_error(adjoint, found) if problem.estimate and q.numel() else None
    return replace(found, reused=factors is not None, recycled=adjoint.shared is not None, error=error)


def begin(q: Tensor, factors: Factors | None, problem: AdjointProblem, capacity: int | None) -> GcrState:
    """The iteration before its first VJP. Factors of a solve that began with a shared inverse stand for M P^-T: to make M of them
    takes P^T, and no other shared inverse."""
    operator = multisecant(factors, problem.skip) if factors is not None else None
    shared = preceding(factors, problem.shared)
    memory = min(problem.max_iter, MEMORY)
    return new_state(q, operator, memory, tol=problem.tol, floor=problem.floor(q.dtype), capacity=capacity, shared=shared)


def preceding(factors: Factors | None, shared: Shared | None) -> Shared | None:
    """What comes before M: P^T of the forward that left the factors; without factors, `shared`."""
    if factors is None:
        return shared
    return None if factors.shared is None else factors.shared.T


def _raw(factors: Factors | None, q: Tensor) -> Tensor:
    """-H^T q by the forward's own inverse H."""
    if factors is None:
        return q.clone()
    w = apply_transpose(factors, q)
    return w if factors.shared is None else factors.shared.T.apply_(w)


def estimated_error(adjoint: GcrState, found: AdjointSolution) -> float:
    """|w - w*| / |w| over the batch, from the iteration's own basis.

    w - w* = (I - J^T)^{-1} r. The images (I - J^T) P of the directions P are orthonormal, so on them the inverse has the norm
    of P, and sqrt(lambda_max(P^T P)) |r| estimates each sample's error: within a factor of three from the fifth VJP on, on slow
    diffusion and on trained bodies.
    """
    P = adjoint.basis[:, 1]
    count = min(P.shape[1], int(adjoint.n.max()))
    held = torch.arange(count, device=P.device) < adjoint.n[:, None]
    P = P[:, :count, : found.w.shape[1]].masked_fill(~held[:, :, None], 0.0)  # what no pair has been put in is not initialised
    largest = torch.linalg.eigvalsh(torch.bmm(P, P.transpose(1, 2)).nan_to_num())[:, -1] if count else P.new_zeros(P.shape[0])
    r = found.residuals * torch.linalg.vector_norm(adjoint.q, dim=1)
    size = float(torch.linalg.vector_norm(found.w))
    return float(torch.linalg.vector_norm(largest.clamp(min=1.0).sqrt() * r)) / size if size else 0.0


def gradient_difference(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """How far the gradients of the operands differ: max over operands of |a_i - b_i| / |b_i|, where those below a tenth of the
    largest count as that large."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    sizes = [float(torch.linalg.vector_norm(y)) for _, y in pairs]
    least = 0.1 * max(sizes, default=0.0)
    gaps = [float(torch.linalg.vector_norm(x - y)) for x, y in pairs]
    return max((gap / max(size, least) for gap, size in zip(gaps, sizes, strict=True) if gap), default=0.0)


def jacobian_free(vjp_full: VJPFull, q: Tensor) -> AdjointSolution:
    """The Jacobian-free gradient, w = q (Fung et al., arXiv 2103.12803): one VJP, residual reported. q is (B, D)."""
    return _one_vjp(vjp_full, q.clone(), q)


@without_grad
def phantom(vjp: VJP, vjp_full: VJPFull, q: Tensor, steps: int, damping: float = 1.0) -> AdjointSolution:
    """The phantom gradient (Geng et al., arXiv 2111.05177) of `steps` damped applications at the fixed point.

    w = damping * sum of (damping J^T + (1 - damping) I)^i q over i < steps: the gradient of z <- damping f(z) + (1 - damping) z
    repeated `steps` times, all linearised at z*. With damping 1 the Neumann series cut after `steps` terms. `steps` VJPs.
    """
    w = damping * q
    for _ in range(steps - 1):
        w = damping * (q + vjp(w)) + (1 - damping) * w
    return replace(_one_vjp(vjp_full, w, q), vjps=steps, needed=steps)


def _relative(q: Tensor, jw: Tensor, w: Tensor) -> tuple[Tensor, float]:
    """|q + J^T w - w| / |q| of each sample (B,) and of the batch; 0 where q = 0."""
    norms, scale = (torch.linalg.vector_norm(v, dim=1) for v in (q + jw.to(q.dtype) - w, q))
    norms = norms.masked_fill(scale == 0, 0.0)
    batch, whole = float(torch.linalg.vector_norm(norms)), float(torch.linalg.vector_norm(scale))
    return norms / scale.masked_fill(scale == 0, 1.0), batch / whole if whole else 0.0


def _one_vjp(vjp_full: VJPFull, w: Tensor, q: Tensor) -> AdjointSolution:
    return certified_at(vjp_full, q, w, AdjointStatus.CONVERGED)


def _refine(vjp: VJP, vjp_full: VJPFull, adjoint: GcrState, max_iter: int, expected: int) -> AdjointSolution:
    needed = 0
    while True:
        needed += 1
        last = needed == max_iter
        whole = last or needed == expected
        payload = None
        if whole:
            jw, payload = vjp_full(adjoint.w)
        else:
            jw = vjp(adjoint.w)
        move(adjoint, jw, last=last, look=whole)
        if adjoint.converged or not adjoint.running:
            break
    chosen, status = choose(adjoint)
    # The product was taken at `w`, where samples that stop stay, but for those whose residual is not finite: they go back.
    if whole and (adjoint.converged or (math.isfinite(adjoint.batch) and torch.equal(chosen, adjoint.w))):
        return AdjointSolution(chosen, payload, needed, adjoint.needed, adjoint.batch, adjoint.residuals, status)
    found = certified_at(vjp_full, adjoint.q, chosen, status)
    return replace(found, vjps=needed + 1, needed=adjoint.needed)


def _unwatched(vjp: VJP, vjp_full: VJPFull, adjoint: GcrState, max_iter: int) -> AdjointSolution:
    adjoint.unwatched()
    for k in range(max_iter):
        move(adjoint, vjp(adjoint.w), last=k + 1 == max_iter)
    w, _, _ = _with_fallbacks(adjoint)
    jw, payload = vjp_full(w)
    norms, scale = (torch.linalg.vector_norm(v, dim=1) for v in (adjoint.q + jw.to(adjoint.q.dtype) - w, adjoint.q))
    return AdjointSolution(w, payload, max_iter + 1, max_iter, math.nan, norms / scale, AdjointStatus.CONVERGED)


def certified_at(vjp_full: VJPFull, q: Tensor, w: Tensor, status: AdjointStatus) -> AdjointSolution:
    """The solution at an estimate w, with its true residual, at one VJP."""
    jw, payload = vjp_full(w)
    residuals, batch = _relative(q, jw, w)
    return AdjointSolution(w, payload, 1, 1, batch, residuals, status if math.isfinite(batch) else AdjointStatus.NONFINITE)


def choose(adjoint: GcrState) -> tuple[Tensor, AdjointStatus]:
    """The estimate to return, ``w``; where the batch missed ``tol``, not for samples that failed or blew up."""
    if adjoint.converged:
        return adjoint.w, AdjointStatus.CONVERGED
    chosen, replaced, lost = _with_fallbacks(adjoint)
    if replaced.any():
        return chosen, AdjointStatus.FALLBACK_COTANGENT if lost.any() else AdjointStatus.FALLBACK_BEST
    capped = bool((adjoint.done == MAX_ITER).any())
    return adjoint.w, AdjointStatus.MAX_ITER if capped else AdjointStatus.FLOOR


def _with_fallbacks(adjoint: GcrState) -> tuple[Tensor, Tensor, Tensor]:
    """``w`` (B, D), or its best trial, or its cotangent; which samples have no w of their own, and which no trial either."""
    # Below the tolerance or the floor is good, however good the best was. Written so that NaN counts as blown up.
    limit = (BLOWN_UP * adjoint.best.clamp(max=1.0)).clamp(min=max(adjoint.tol, adjoint.floor))
    blown = ~(adjoint.residuals <= limit)
    # Samples that failed have been put back to their best estimate, or to q.
    usable = adjoint.best <= BLOWN_UP
    replaced = blown | (adjoint.done == NONFINITE)
    fallback = torch.where(usable[:, None], adjoint.z_best, adjoint.q)
    return torch.where(blown[:, None], fallback, adjoint.w), replaced, replaced & ~usable
