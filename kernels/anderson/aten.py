"""Anderson acceleration in ATen operators: any device, float32 or float64, decisions by masks alone.

With g_k = f(z_k) - z_k and the last m differences dz_j, dg_j (Anderson 1965; type II of Fang & Saad 2009):

    gamma = argmin |g_k - sum_j gamma_j dg_j|        z_{k+1} = z_k + beta g_k - sum_j gamma_j (dz_j + beta dg_j)

The normal equations are scaled to a unit diagonal and solved in float64 with a ridge of a few eps of the products' precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..iteration import RUNNING, Progress, observe_by_masks, progress_fields
from ..precision import without_autocast

RIDGE_EPS = 10.0


@dataclass(kw_only=True, eq=False)
class AndersonState(Progress):
    """State of the iteration; `active` is what the host last saw.

    Attributes:
        window: (B, 2, m, D) the last differences dz, dg; a ring, all samples in lockstep.
        gram: (B, m, m) products of the dg.
        previous: (B, 2, D) z and g of the last evaluation.
        damping: beta.
        poll_every: evaluations between two looks at the device.
    """

    window: Tensor
    gram: Tensor
    previous: Tensor
    damping: float
    poll_every: int


def check(memory: int, damping: float) -> None:
    """
    Raises:
        ValueError: ``memory`` or ``damping`` out of range.
    """
    if memory < 1:
        raise ValueError(f"expected memory >= 1, got {memory}")
    if not 0 < damping <= 1:
        raise ValueError(f"expected damping in (0, 1], got {damping}")


def new_state(
    z0: Tensor, memory: int, damping: float = 1.0, *, tol: float = 0.0, relative: bool = True, floor: float = 0.0
) -> AndersonState:
    """The iteration at z0 (B, D), float32 or float64, before its first evaluation.

    Args:
        z0: initial iterate; copied.
        memory: differences m that are kept, at least 1.
        damping: beta in (0, 1].
        tol: see :class:`~..broyden.state.Progress`; so are ``relative`` and ``floor``.

    Raises:
        ValueError: ``memory`` or ``damping`` out of range.
    """
    check(memory, damping)
    B, D = z0.shape
    return AndersonState(
        window=z0.new_zeros((B, 2, memory, D)),
        gram=z0.new_zeros((B, memory, memory)),
        previous=z0.new_zeros((B, 2, D)),
        damping=damping,
        poll_every=1 if z0.device.type == "cpu" else 4,
        **progress_fields(z0, tol, relative, floor),
    )


@without_autocast
def step(state: AndersonState, z: Tensor, f: Tensor, *, last: bool = False) -> None:
    """Observe f = body(z), then move every sample that still runs. In place; nothing goes to the host but `active`, now and then.

    Args:
        state: changed in place.
        z: (B, D) current iterates, compute dtype; changed in place.
        f: (B, D) body(z); any floating dtype.
        last: no evaluation will follow: samples that would go on get MAX_ITER.
    """
    s = state
    f = f.to(z.dtype)
    g = f - z
    observe_by_masks(s, z, g, f, last)
    running = (s.done == RUNNING)[:, None]
    ahead = _accelerated(s, z, g) if s.evaluations > 1 else z + s.damping * g
    s.previous[:, 0], s.previous[:, 1] = z, g
    # Select, never multiply by a mask: 0 * NaN is NaN.
    torch.where(running, ahead, z, out=z)
    if last:
        s.active = 0
    elif s.evaluations % s.poll_every == 0:
        s.active = int(running.sum())


def _accelerated(s: AndersonState, z: Tensor, g: Tensor) -> Tensor:
    memory = s.window.shape[2]
    slot, held = (s.evaluations - 2) % memory, min(s.evaluations - 1, memory)
    dz, dg = s.window[:, 0, :held], s.window[:, 1, :held]
    dz[:, slot], dg[:, slot] = z - s.previous[:, 0], g - s.previous[:, 1]
    # One read of the window for the new row of the Gram matrix and for the right-hand side.
    products = torch.bmm(torch.stack((dg[:, slot], g), 1), dg.transpose(1, 2))
    s.gram[:, slot, :held] = s.gram[:, :held, slot] = products[:, 0]
    G, b = s.gram[:, :held, :held].double(), products[:, 1].double()
    size = G.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    inverse = torch.where(size > 0, size.reciprocal(), 0.0)
    A = G * inverse[:, :, None] * inverse[:, None]
    A.diagonal(dim1=1, dim2=2).add_(RIDGE_EPS * torch.finfo(g.dtype).eps).add_((size == 0).double())
    factor, info = torch.linalg.cholesky_ex(A)
    gamma = torch.cholesky_solve((b * inverse)[:, :, None], factor)[:, :, 0] * inverse
    usable = (info == 0) & torch.isfinite(gamma).all(1)
    gamma = torch.where(usable[:, None], gamma, 0.0).to(g.dtype)[:, None]
    step = torch.bmm(gamma, dz) + s.damping * torch.bmm(gamma, dg)
    return z + s.damping * g - step[:, 0]
