"""Which implementation works on a state: Triton on a GPU, the fused C++ step on a CPU, ATen where they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..device import on_gpu, triton_kernels
from ..tiles import offsets_fit
from . import aten
from .cpu import CpuState
from .gpu import TritonState
from .state import BroydenState, check_given, check_start, new_aten_state, new_factors

_OWN = (CpuState, TritonState)  # they step by themselves


def new_state(
    z0: Tensor,
    memory: int,
    factor_dtype: torch.dtype | None = None,
    eta: float = 0.1,
    S: Tensor | None = None,
    C: Tensor | None = None,
    *,
    tol: float = 0.0,
    relative: bool = True,
    floor: float = 0.0,
    capacity: int | None = None,
) -> BroydenState:
    """A Broyden state with no stored step, H = -I.

    Args:
        z0: (B, D) initial iterate, float32 or float64; that dtype is the compute dtype. Copied.
        memory: number of updates M that fit before a restart, at least 1.
        factor_dtype: dtype of S; None is that of ``z0``, or of ``S`` where that is given.
        eta: Powell's guard, 0 <= eta < 1.
        S: (B, M+1, D) buffer to use, rows dense and evenly spaced; its contents are never read.
        C: (B, M, coefficient_width(M)) buffer to use, in the compute dtype; its contents are never read.
        tol: see :class:`~.state.Progress`; so are ``relative`` and ``floor``.
        capacity: updates to make room for at first, at least 1; where more are stored the C++ step makes more room. None: all
            ``memory``. Others than the C++ step always make room for all.

    Raises:
        ValueError: a shape, dtype or number that is not as above.
    """
    factor_dtype = check_start(z0, memory, factor_dtype, eta, S)
    check_given(z0, memory, factor_dtype, S, C)
    contiguous = all(given is None or given.is_contiguous() for given in (S, C))
    if factor_dtype == z0.dtype and contiguous and z0.device.type == "cpu" and not on_gpu(z0.device):
        functions = native.functions_of(z0.dtype)
        if functions is not None:
            return CpuState(z0, S, C, memory, capacity, eta=eta, tol=tol, relative=relative, floor=floor, functions=functions)
    if S is None or C is None:
        own = new_factors(z0, memory, factor_dtype)
        S, C = own[0] if S is None else S, own[1] if C is None else C
    if on_gpu(z0.device) and offsets_fit(S.shape[1], S.stride(1)) and (kernels := triton_kernels("broyden")) is not None:
        return TritonState.create(z0, S, C, eta=eta, tol=tol, relative=relative, floor=floor, kernels=kernels)
    return new_aten_state(z0, S, C, eta=eta, tol=tol, relative=relative, floor=floor)


def step(state: BroydenState, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
    """Observe f = body(z), then move every sample that still runs to its next Broyden iterate. In place.

    Args:
        state: of the iteration; changed in place.
        z: (B, D) current iterates, contiguous, compute dtype; changed in place.
        f: (B, D) body(z); any floating dtype.
        stop_norm: (B,) relative residual to stop on, where |f - z| is not the one that counts.
        last: no evaluation will follow: samples that would go on get MAX_ITER, and nothing is updated.
    """
    if isinstance(state, _OWN):
        state.step(z, f, stop_norm=stop_norm, last=last)
    else:
        aten.step(state, z, f, stop_norm=stop_norm, last=last)


def step_residual(state: BroydenState, z: Tensor, g: Tensor, stop_norm: Tensor, *, last: bool = False) -> None:
    """:func:`step` where the residual ``g`` (B, D) itself is known: f = z + g would cost its last digits."""
    if isinstance(state, _OWN):
        state.step_residual(z, g, stop_norm, last=last)
    else:
        aten.step_residual(state, z, g, stop_norm, last=last)


def step_preconditioned(
    state: BroydenState, z: Tensor, f: Tensor, moved: Tensor, *, squares: Tensor | None = None, last: bool = False
) -> None:
    """:func:`step` of an inverse that begins with H_0 = -P: f - z is judged, ``moved`` = P (f - z), (B, D), is what is moved by.
    What is stored are the factors of the preconditioned problem.

    Args:
        squares: what the Triton products found on their way, see :meth:`~..recycle.Products.residual`; for the Triton step alone.
    """
    if isinstance(state, CpuState):
        state.step_preconditioned(z, f, moved, last=last)
    elif isinstance(state, TritonState):
        state.step_preconditioned(z, f, moved, squares=squares, last=last)
    else:
        aten.step_preconditioned(state, z, f, moved, last=last)


def step_shared(state: BroydenState, z: Tensor, f: Tensor, g: Tensor | None = None, *, last: bool = False) -> None:
    """:func:`step_preconditioned` by the shared inverse that the state begins with; see :meth:`BroydenState.begin_with`.

    Args:
        f: (B, D) body(z); any floating dtype.
        g: (B, D) f - z where that is known, compute dtype; changed in place.
    """
    assert state.shared is not None
    if isinstance(state, TritonState) and state.step_shared(z, f, last=last):
        return
    f = f.to(z.dtype)
    if g is None:
        g = torch.sub(f, z, out=state.spare)
    step_preconditioned(state, z, f, state.shared.apply_(g), last=last)


def advance(state: BroydenState, z: Tensor, g: Tensor) -> None:
    """One Broyden step from ``z`` with residual ``g`` (both (B, D)), for the samples that still run; nothing is observed."""
    if isinstance(state, _OWN):
        state.advance(z, g)
    else:
        aten.advance(state, z, g)
