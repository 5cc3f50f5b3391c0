"""The steps-only good Broyden update in ATen operators: any device, float32 or float64.

With H_0 = -I and full steps, good Broyden's update collapses to H_{k+1} = (I + kappa_k s_{k+1} s_k^T) H_k with
kappa_k = theta_k / |s_k|^2 (Kelley, Iterative Methods for Linear and Nonlinear Equations, 1995, section 7.3), hence
H = -(I + S[1:]^T C S[:-1]) with C lower triangular. theta is Powell's guard (Powell 1970; theta = 1 is the textbook).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..iteration import NORM_EPS, RUNNING, observe
from ..precision import without_autocast
from .state import BroydenState


@without_autocast
def step(state: BroydenState, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
    """Observe f = body(z), then move every sample that still runs to its next Broyden iterate. In place.

    Args:
        state: of the iteration; changed in place.
        z: (B, D) current iterates, compute dtype; changed in place.
        f: (B, D) body(z); any floating dtype.
        stop_norm: (B,) relative residual to stop on, where |f - z| is not the one that counts.
        last: no evaluation will follow: samples that would go on get MAX_ITER, and nothing is updated.
    """
    f = f.to(z.dtype)
    g = torch.sub(f, z, out=_slot_for_residual(state, z))
    scale = None if stop_norm is not None else torch.linalg.vector_norm(f, dim=1).add_(NORM_EPS)
    norm = torch.linalg.vector_norm(g, dim=1) if stop_norm is None else stop_norm
    _observe_and_advance(state, z, g, norm, scale, last, f)


@without_autocast
def step_residual(state: BroydenState, z: Tensor, g: Tensor, stop_norm: Tensor, *, last: bool = False) -> None:
    """:func:`step` where the residual ``g`` (B, D) itself is known: f = z + g would cost its last digits."""
    _observe_and_advance(state, z, g, stop_norm, None, last)


@without_autocast
def step_preconditioned(state: BroydenState, z: Tensor, f: Tensor, moved: Tensor, *, last: bool = False) -> None:
    """:func:`step` that judges f - z and moves by `moved` (B, D), which is P (f - z): an inverse that begins with H_0 = -P."""
    f = f.to(z.dtype)
    norm, scale = torch.linalg.vector_norm(f - z, dim=1), torch.linalg.vector_norm(f, dim=1).add_(NORM_EPS)
    _observe_and_advance(state, z, moved, norm, scale, last, f)


def _observe_and_advance(
    state: BroydenState, z: Tensor, g: Tensor, norm: Tensor, scale: Tensor | None, last: bool, f: Tensor | None = None
) -> None:
    active = state.active
    failed = observe(state, z, norm, scale, last=last, f=f)
    if failed is not None:
        _drop_last_step(state, failed)
    # A kept iterate needs no update; nor does a batch none of whose samples goes on.
    if state.active and active:
        advance(state, z, g)


def _drop_last_step(state: BroydenState, failed: Tensor) -> None:
    """Take back the step that led the ``failed`` (B,) samples to a non-finite f, so that their factors stay finite."""
    n = state.count
    # The residual may lie in slot n already; slot n - 1 holds the step.
    state.S[failed, max(n - 1, 0) : n + 1] = 0
    if n > 0:
        state.n[failed] = n - 1
    if n > 1:
        state.C[failed, n - 2] = 0


def _in_place(state: BroydenState, dtype: torch.dtype) -> bool:
    """Whether the residual may be put in slot ``count`` of S, next to the steps it is multiplied with."""
    return state.S.dtype == dtype and not state.guarded and state.count <= state.memory


def _slot_for_residual(state: BroydenState, z: Tensor) -> Tensor:
    return state.S[:, state.count] if _in_place(state, z.dtype) else torch.empty_like(z)


def _steps_and_residual(state: BroydenState, g: Tensor) -> Tensor:
    """(B, n+1, D) in the compute dtype: s_0 .. s_{n-1}, g. A view of S where that is possible."""
    n = state.count
    if not _in_place(state, g.dtype):
        return torch.cat((state.S[:, :n].to(g.dtype), g[:, None]), 1)
    slot = state.S[:, n]
    if slot.data_ptr() != g.data_ptr():
        slot.copy_(g)
    return state.S[:, : n + 1]


@without_autocast
def advance(state: BroydenState, z: Tensor, g: Tensor) -> None:
    """One Broyden step from ``z`` with residual ``g``, for the samples that still run. In place, without a host sync.

    Args:
        state: changed in place; restarts when it is full.
        z: (B, D) iterates, compute dtype; changed in place.
        g: (B, D) residuals, compute dtype; may be the view of S that :func:`step` put them in.
    """
    n = state.count
    frozen = (state.done != RUNNING)[:, None] if state.frozen else None
    if n == 0:
        _store(state, 0, z, g, frozen)
    else:
        p, row = _update(state, _steps_and_residual(state, g))
        if n > state.memory:
            n = _restart(state, frozen)
            row = row[:, -1:]
        target = state.C[:, n - 1, :n]
        target.copy_(row if frozen is None else torch.where(frozen, target, row))
        _store(state, n, z, p, frozen)
    state.count = n + 1
    state.slots_written = max(state.slots_written, state.count)
    if frozen is None:
        state.n.fill_(state.count)
    else:
        state.n.masked_fill_(state.done == RUNNING, state.count)


def _update(state: BroydenState, stack: Tensor) -> tuple[Tensor, Tensor]:
    """The next step p (B, D), and the new row of C (B, n) that pairs it with the last one; ``stack`` is (B, n+1, D)."""
    n = stack.shape[1] - 1
    # One pass over the steps for both sets of products: r_j = s_j . s_{n-1} and a_j = s_j . g.
    products = torch.bmm(stack[:, n - 1 :], stack[:, :n].transpose(1, 2))
    r, a = products[:, :1], products[:, 1:]
    sigma, minus_tau = r[:, :, n - 1 :], a[:, :, n - 1 :]
    weights = row = torch.ones_like(sigma)
    if n > 1:
        C = state.C[:, : n - 1, : n - 1]
        minus_c = torch.bmm(a[:, :, : n - 1], C.transpose(1, 2))
        minus_tau = torch.baddbmm(minus_tau, minus_c, r[:, :, 1:].transpose(1, 2))
        weights = torch.cat((minus_c, weights), 2)
        row = torch.cat((torch.bmm(r[:, :, 1:], C), row), 2)
    denominator, kappa = _guard(sigma, minus_tau, state.eta)
    p = torch.bmm(weights / denominator, stack[:, 1:])
    # kappa = 0 skips the update, but 0 * inf would not, and the factors outlive this call.
    row = (row * kappa).nan_to_num_(0.0, 0.0, 0.0)
    return p[:, 0], row[:, 0]


def _guard(sigma: Tensor, minus_tau: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """1 + theta tau / sigma and kappa = theta / sigma, both shaped as ``sigma``; (1, 0), no update, where undefined.

    With gamma = 1 + tau / sigma, Powell's theta = (1 - sign(gamma) eta) / (1 - gamma) lifts the denominator from gamma
    to sign(gamma) eta.
    """
    gamma = (sigma - minus_tau) / sigma
    kappa = sigma.reciprocal()
    denominator = gamma
    if eta > 0:
        denominator = gamma.abs().clamp_(min=eta).copysign_(gamma)
        damped = denominator != gamma
        kappa = torch.where(damped, (1 - denominator).div_(minus_tau), kappa)
    # One test for all of: sigma = 0 or tiny, denominator 0, anything infinite or NaN. x - x is 0 for finite x only.
    unusable = torch.addcdiv(denominator, kappa, denominator)
    unusable = unusable.sub_(unusable) != 0
    return denominator.masked_fill(unusable, 1.0), kappa.masked_fill_(unusable, 0.0)


def _store(state: BroydenState, slot: int, z: Tensor, p: Tensor, frozen: Tensor | None) -> None:
    """Put the step ``p`` (B, D) in its slot and add it to ``z``; frozen samples keep theirs, bit for bit."""
    stored = state.S[:, slot]
    if frozen is not None:
        # x + -0.0 is x for every x, also for x = -0.0. p may be the slot itself, so not in place.
        p = p.masked_fill(frozen, -0.0)
    if stored.dtype == torch.float16:
        # Overflow would leave an inf among the factors.
        p = p.clamp(-65504.0, 65504.0)
    if state.guarded and frozen is not None:
        p = p.to(stored.dtype)
        stored.copy_(torch.where(frozen, stored, p))
        z.add_(p)
        return
    if stored.data_ptr() != p.data_ptr():
        stored.copy_(p)
    # With low-precision factors the iterate moves by the rounded step: s_k = z_{k+1} - z_k holds exactly.
    z.add_(stored)


def _restart(state: BroydenState, frozen: Tensor | None) -> int:
    """Make room by keeping the last step only, as s_0 of a new product; returns the number of steps kept.

    The new step has been computed with the full memory. To 1e-6 this took 41.6 iterations, clearing everything 42.5
    (float64, B 32, D 128, means over linear and tanh bodies, symmetric or not, with M = 5, 10, 20); all got there.
    """
    last = state.S[:, state.memory].clone()
    if frozen is None:
        state.S[:, 0] = last
        state.C.zero_()
    else:
        # What froze before keeps its factors: the backward reuses them. From now on slots below `slots_written` may be in use.
        state.guarded = True
        state.S[:, 0] = torch.where(frozen, state.S[:, 0], last)
        state.C.masked_fill_(~frozen[:, :, None], 0)
    return 1
