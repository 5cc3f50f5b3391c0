"""Which implementation runs the adjoint iteration: Triton on a GPU, C++ on a CPU, ATen where they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, workspace
from ..broyden.state import COMPUTE_DTYPES, row_width
from ..device import on_gpu, triton_kernels
from ..iteration import RUNNING, progress_fields
from ..precision import without_autocast
from ..recycle import Shared
from ..reuse.multisecant import Multisecant
from ..tiles import offsets_fit
from . import aten
from .cpu import CpuGcr
from .gpu import TritonGcr
from .state import GcrState


def new_state(
    q: Tensor, operator: Multisecant | None, memory: int, *, tol: float, floor: float = 0.0, capacity: int | None = None,
    shared: Shared | None = None,
) -> GcrState:  # fmt: skip
    """The iteration for w = q + J^T w, before its first VJP, which is to be taken at ``state.w`` = M q.

    Args:
        q: (B, D) cotangents, float32 or float64; not changed, and read until the iteration ends.
        operator: M, see :func:`~..reuse.multisecant`; None is the identity.
        memory: pairs that are stored before the basis is dropped, at least 1.
        tol: relative residual at which a sample, or the batch as a whole, stops.
        floor: relative residual below which stagnation counts as having converged.
        capacity: VJPs to make room for at first, where C++ runs the iteration; None: not known.
        shared: what is put before M, about (I - J^T)^-1 as well.

    Raises:
        ValueError: an argument that is not as above.
    """
    if q.dim() != 2 or q.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"expected q of shape (B, D) in float32 or float64, got {tuple(q.shape)} in {q.dtype}")
    if memory < 1:
        raise ValueError(f"expected memory >= 1, got {memory}")
    state = _new_state(q.contiguous(), operator, memory, tol, floor, capacity)
    if shared is not None:
        state.shared = shared
        if isinstance(state, TritonGcr) and state.begin_with(shared):
            return state
        state.spare = workspace.empty(q.shape, q.dtype) if q.device.type == "cpu" else torch.empty_like(q)
        shared.apply_(state.w)
    return state


def _new_state(q: Tensor, operator: Multisecant | None, memory: int, tol: float, floor: float, capacity: int | None) -> GcrState:
    fits = offsets_fit(2 * memory, row_width(q.shape[1], q.device))
    if operator is not None:
        fits = fits and offsets_fit(operator.S.shape[1], operator.S.stride(1))
    if on_gpu(q.device) and fits and (kernels := triton_kernels("gcr")) is not None:
        return TritonGcr.create(q, operator, memory, tol, floor, kernels)
    functions = native.functions(q) if operator is None else native.functions(q, operator.S, operator.V)
    if functions is not None:
        return CpuGcr(q, operator, memory, tol, floor, capacity, functions)
    return aten.new_aten_state(q, operator, memory, progress_fields(q, tol, relative=True, floor=floor))


def move(state: GcrState, jw: Tensor, *, last: bool = False, look: bool = False) -> None:
    """Judge the VJP jw = J^T w (B, D) at ``state.w``, then move every sample that still runs to its next trial. In place.

    Sets ``residuals`` and ``batch``, those of ``state.w`` as it was. Where the batch's residual is at most
    ``tol`` nothing moves and ``converged`` is set. Samples that stop keep their ``w``; one whose residual is not finite goes
    back to its best trial.

    Args:
        state: changed in place.
        jw: (B, D), any floating dtype.
        last: no VJP will follow: samples that would go on get MAX_ITER, and nothing moves.
        look: ask a device how it stands, rather than every fourth time.
    """
    if jw.dtype != state.q.dtype:
        jw = jw.to(state.q.dtype)
    if isinstance(state, CpuGcr):
        state.move(jw, last)
    elif isinstance(state, TritonGcr):
        state.move(jw, last, look)
    else:
        aten.move(state, jw, last)
    if state.spare is not None and state.active and not state.converged:
        _precede(state, state.spare)


@without_autocast
def _precede(state: GcrState, spare: Tensor) -> None:
    """The trial w = x + M r becomes x + P M r, for the samples that go on."""
    shared = state.shared
    assert shared is not None
    weights = shared.weights(torch.sub(state.w, state.x, out=spare))
    if state.frozen or isinstance(state, TritonGcr):  # whose host may be behind
        weights.masked_fill_((state.done != RUNNING)[:, None], 0.0)
    state.w.addmm_(weights, shared.A, alpha=-1)
