"""Anderson acceleration's state, and its step: C++ on a CPU, ATen elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..broyden.cpu import CpuAnderson
from ..device import on_gpu
from ..iteration import Progress
from . import aten


def new_state(
    z0: Tensor, memory: int, damping: float = 1.0, *, tol: float = 0.0, relative: bool = True, floor: float = 0.0
) -> tuple[Progress, Tensor]:
    """The iteration at z0 before its first evaluation, and the iterate that :func:`step` moves.

    Args:
        z0: (B, D) initial iterate, float32 or float64; that dtype is the compute dtype. Copied.
        memory: differences m that are kept, at least 1.
        damping: beta in (0, 1].
        tol: see :class:`~deq_compile.kernels.iteration.Progress`; so are ``relative`` and ``floor``.

    Raises:
        ValueError: ``memory`` or ``damping`` out of range.
    """
    aten.check(memory, damping)
    if z0.device.type == "cpu" and not on_gpu(z0.device) and (functions := native.functions_of(z0.dtype)) is not None:
        state = CpuAnderson(z0, memory, damping, tol=tol, relative=relative, floor=floor, functions=functions)
        return state, state.iterate(z0)
    return aten.new_state(z0, memory, damping, tol=tol, relative=relative, floor=floor), z0.clone(
        memory_format=torch.contiguous_format
    )


def step(progress: Progress, z: Tensor, f: Tensor, *, last: bool = False) -> None:
    """Observe f = body(z), then move every sample that still runs. In place.

    Args:
        progress: as :func:`new_state` made it.
        z: (B, D) current iterates, contiguous, compute dtype; changed in place.
        f: (B, D) body(z); any floating dtype.
        last: no evaluation will follow: samples that would go on get MAX_ITER, and stay.
    """
    if isinstance(progress, CpuAnderson):
        progress.step(z, f, last=last)
        return
    assert isinstance(progress, aten.AndersonState)
    aten.step(progress, z, f, last=last)
