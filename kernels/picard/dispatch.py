"""A plain iteration's state, and its step."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..broyden.cpu import CpuPlain
from ..device import on_gpu
from ..iteration import NORM_EPS, RUNNING, Progress, new_progress, observe


def new_state(z0: Tensor, *, tol: float = 0.0, relative: bool = True, floor: float = 0.0) -> tuple[Progress, Tensor]:
    """The iteration before its first evaluation, and the iterate that :func:`step` moves.

    Args:
        z0: (B, D) initial iterate, float32 or float64; that dtype is the compute dtype. Copied.
        tol: see :class:`~deq_compile.kernels.iteration.Progress`; so are ``relative`` and ``floor``.
    """
    if z0.device.type == "cpu" and not on_gpu(z0.device) and (functions := native.functions_of(z0.dtype)) is not None:
        state = CpuPlain(z0, tol=tol, relative=relative, floor=floor, functions=functions)
        return state, state.iterate(z0)
    return new_progress(z0, tol=tol, relative=relative, floor=floor), z0.clone(memory_format=torch.contiguous_format)


def step(progress: Progress, z: Tensor, f: Tensor, *, last: bool = False) -> None:
    """Observe f = body(z), then z <- f for every sample that still runs. In place.

    Args:
        progress: as :func:`new_state` made it.
        z: (B, D) current iterates, contiguous, compute dtype; changed in place.
        f: (B, D) body(z); any floating dtype.
        last: no evaluation will follow: samples that would go on get MAX_ITER, and stay.
    """
    if isinstance(progress, CpuPlain):
        progress.step(z, f, last=last)
        return
    f = f.to(z.dtype)
    scale = torch.linalg.vector_norm(f, dim=1).add_(NORM_EPS)
    observe(progress, z, torch.linalg.vector_norm(f - z, dim=1), scale, last=last, f=f)
    if progress.frozen:
        torch.where((progress.done == RUNNING)[:, None], f, z, out=z)
    else:
        z.copy_(f)
