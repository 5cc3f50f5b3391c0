"""The stopping rule in ATen operators: with a question to the host, and by masks alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .state import (
    CONVERGED,
    FALL,
    FLOOR,
    MAX_ITER,
    NONFINITE,
    NORM_EPS,
    RESOLUTION,
    RUNNING,
    STALL_GAIN,
    STALL_PATIENCE,
    Progress,
)


def observe(
    progress: Progress, z: Tensor, norm: Tensor, scale: Tensor | None = None, *, last: bool = False, f: Tensor | None = None
) -> Tensor | None:
    """Record the residuals at ``z``: the best iterates, and which samples stop here. Synchronises with the host.

    Samples whose residual is not finite stop with their rows of ``z`` put back to their best iterate. Where none was finite,
    what is returned for them is their row of ``f``, the plain iteration's.

    Args:
        progress: changed in place.
        z: (B, D) the iterates that were evaluated; changed in place for the samples that failed.
        norm: (B,) |g|, or the relative residual itself where ``scale`` is None.
        scale: (B,) what turns |g| into a relative residual.
        last: no evaluation will follow.
        f: (B, D) body(z), where that is known.

    Returns:
        (B,) bool, the samples that failed at this evaluation; None if none did.
    """
    p = progress
    p.evaluations += 1
    if not p.active:
        return None
    stop = norm / scale if scale is not None and p.relative else norm
    if scale is not None:
        if p.evaluations == 1:
            p.ceiling.copy_(p.ceiling_at(norm, scale))
        norm = torch.maximum(norm, RESOLUTION * torch.finfo(z.dtype).eps * scale)
    if p.frozen:
        running = p.done == RUNNING
        stop = stop.masked_fill(~running, math.inf)
        lowest = stop.min().item()
        healthy = int((stop < math.inf).sum()) == p.active
    else:
        low, high = torch.aminmax(stop)  # both are NaN if any residual is
        lowest = low.item()
        healthy = high.item() < math.inf
    # Select, never multiply by a mask: 0 * NaN is NaN. NaN < x is false, so a failure is no improvement.
    improved = stop < p.best
    torch.fmin(p.best, stop, out=p.best)
    if improved.all():
        p.z_best.copy_(z)  # the usual case; a select with a broadcast mask takes five times as long
    else:
        torch.where(improved[:, None], z, p.z_best, out=p.z_best)
    stalled = _stalled(p, stop, scale, lowest) if p.floor > 0 else None
    if healthy and lowest > p.tol and stalled is None and not last:
        return None
    return _stop_samples(p, z, norm, stop, stalled, healthy, last, f)


def _stalled(p: Progress, stop: Tensor, scale: Tensor | None, lowest: float) -> Tensor | None:
    """(B,) bool, samples that stagnate below the floor; None while no sample has come near it."""
    if p.relative:
        scale = None  # ``stop`` is relative already
    if not p.near_floor:
        if scale is not None:
            lowest = (stop / scale).min().item()
        # Not "lowest < floor": where a sample is NaN, so is the minimum, and another may be near the floor.
        p.near_floor = not lowest >= p.floor
        if not p.near_floor:
            return None
    # A sample counts only its own evaluations below the floor, so when it stops does not depend on its neighbours.
    below = p.best < (p.floor if scale is None else p.floor * scale)
    gained = below & (p.best < STALL_GAIN * p.mark)
    torch.where(gained, p.best, p.mark, out=p.mark)
    p.stall.add_(1).masked_fill_(gained | ~below, 0)
    return p.stall >= STALL_PATIENCE


def _stop_samples(
    p: Progress, z: Tensor, norm: Tensor, stop: Tensor, stalled: Tensor | None, healthy: bool, last: bool, f: Tensor | None
) -> Tensor | None:
    """Freeze what stops at this evaluation; the mask of the samples that failed, None where ``healthy``."""
    running = p.done == RUNNING
    code = torch.full_like(p.done, MAX_ITER if last else RUNNING)
    if stalled is not None:
        code.masked_fill_(stalled & (norm <= p.fall_at_floor * p.ceiling), FLOOR)
    code.masked_fill_((stop <= p.tol) & (norm <= FALL * p.ceiling), CONVERGED)
    failed = None
    if not healthy:
        failed = running & ~torch.isfinite(stop)
        code.masked_fill_(failed, NONFINITE)
        torch.where(failed[:, None], p.z_best, z, out=z)
        if f is not None:
            never = failed & torch.isinf(p.best)
            torch.where(never[:, None], f, p.z_best, out=p.z_best)
    p.freeze(code != RUNNING, code)
    return failed


def observe_by_masks(p: Progress, z: Tensor, g: Tensor, f: Tensor, last: bool) -> None:
    """:func:`observe` for g = f - z, without a question to the host; `active` is left as it is.

    Args:
        p: changed in place.
        z: (B, D) the iterates that were evaluated. A failed sample's goes back to its best iterate.
        g: (B, D) residuals at z.
        f: (B, D) body(z), compute dtype.
        last: no evaluation will follow.

    `p.evaluations` may be a tensor of one integer, where the iteration is itself part of a graph (broyden/padded.py).
    """
    p.evaluations += 1
    scale = torch.linalg.vector_norm(f, dim=1).add_(NORM_EPS)
    stop = norm = torch.linalg.vector_norm(g, dim=1)
    threshold = p.floor if p.relative else p.floor * scale
    if p.relative:
        stop = norm / scale
    counted: Any = p.evaluations
    if isinstance(counted, Tensor):
        torch.where(counted == 1, p.ceiling_at(norm, scale), p.ceiling, out=p.ceiling)
    elif counted == 1:
        p.ceiling.copy_(p.ceiling_at(norm, scale))
    norm = torch.maximum(norm, RESOLUTION * torch.finfo(z.dtype).eps * scale)
    running, finite = p.done == RUNNING, torch.isfinite(stop)
    improved = running & finite & (stop < p.best)
    torch.where(improved, stop, p.best, out=p.best)
    torch.where(improved[:, None], z, p.z_best, out=p.z_best)
    below = p.best < threshold
    gained = below & (p.best < STALL_GAIN * p.mark)
    torch.where(gained & running, p.best, p.mark, out=p.mark)
    p.stall.add_(1).masked_fill_(gained | ~below, 0)
    code = torch.full_like(p.done, MAX_ITER if last else RUNNING)
    code.masked_fill_(below & (p.stall >= STALL_PATIENCE) & (norm <= p.fall_at_floor * p.ceiling), FLOOR)
    code.masked_fill_((stop <= p.tol) & (norm <= FALL * p.ceiling), CONVERGED)
    code.masked_fill_(~finite, NONFINITE)
    stopped = running & (code != RUNNING)
    torch.where((stopped & ~finite)[:, None], p.z_best, z, out=z)
    torch.where((stopped & ~finite & torch.isinf(p.best))[:, None], f, p.z_best, out=p.z_best)
    torch.where(stopped, code, p.done, out=p.done)
    p.iterations.masked_fill_(stopped, p.evaluations)
