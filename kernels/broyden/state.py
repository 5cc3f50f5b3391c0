"""What Broyden's iteration keeps beside its progress: the factors it has built.

All samples advance in lockstep, so those that still run have stored equally many steps: the host counts them without a
question to the device. A sample that stops is *frozen*: its factors no longer change, whatever others do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import workspace
from ..device import on_gpu
from ..iteration import Progress, progress_fields
from ..recycle import Products, Shared, Sketch

COMPUTE_DTYPES = (torch.float32, torch.float64)
FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(kw_only=True, eq=False)
class Factors:
    """The inverse-Jacobian estimate H = -(I + S[1:]^T C S[:-1]) of each sample, as steps (Kelley's product form).

    Two properties let every sample be used with the same slice, whatever its own ``n``: ``S[:, :slots_written]`` is finite, and
    row j of C is zero from j = n - 1 on.

    Attributes:
        S: (B, M+1, D) steps s_0 .. s_{n-1}; compute dtype, bfloat16 or float16. Uninitialised from slot ``slots_written`` on.
        C: (B, M, coefficient_width(M)) lower triangular, compute dtype; columns from M on are padding.
        n: (B,) int32, number of steps stored; n - 1 of them have a row in C.
        slots_written: number of slots of S that have ever been written.
        native: what an implementation remembers of the tensors above.
        shared: P = -H_0 where the solve did not begin with H_0 = -I: H is then the one above, times P.
    """

    S: Tensor
    C: Tensor
    n: Tensor
    slots_written: int = 0
    native: Any = None
    shared: Shared | None = None

    @property
    def memory(self) -> int:
        """M, the number of updates that fit before a restart."""
        return self.C.shape[1]

    def alone(self) -> Factors:
        """The factors without what an iteration keeps beside them, once that has ended. They hold no iterate: whoever computes
        gradients may keep them with the graph that the iterate is a part of."""
        return self


@dataclass(kw_only=True, eq=False)
class BroydenState(Progress, Factors):
    """State of a batched Broyden iteration.

    Attributes:
        eta: Powell's guard: an update whose denominator is below eta in magnitude is damped; 0 for the textbook's.
        count: steps stored by every sample that still runs; equals its ``n``.
        guarded: whether samples were frozen before a restart, so that slots below ``slots_written`` may be in use.
        sketch: where the iteration takes down what it passes.
        spare: (B, D) for the residual where `shared` or `sketch` asks for it: a new tensor an iteration would be faulted in.
        products: with `shared`, in Triton; None before the first, and where ATen takes them.
    """

    eta: float
    count: int = 0
    guarded: bool = False
    sketch: Sketch | None = None
    spare: Tensor | None = None
    products: Products | None = None

    def unwatched(self) -> None:
        """Do not ask a device how far it is: the iteration goes on to its cap, as somebody else's capture needs."""

    def alone(self) -> Factors:
        return Factors(S=self.S, C=self.C, n=self.n, slots_written=self.slots_written, shared=self.shared)

    def begin_with(self, z0: Tensor, shared: Shared | None, sketch: Sketch | None) -> None:
        """Begin at z0 with H_0 = -P of a shared inverse, and tell a sketch what the iteration passes. Before the first step."""
        self.shared, self.sketch = shared, sketch
        self.spare = _dense(tuple(z0.shape), z0.dtype, z0.device)

    def iterate(self, z0: Tensor) -> Tensor:
        """The iterate to begin with: (B, D), contiguous, equal to the ``z0`` of this state and no other's."""
        return z0.clone(memory_format=torch.contiguous_format)


def factors_of(S: Tensor, C: Tensor, n: Tensor) -> Factors:
    """Factors from the tensors that a finished solve left (S, C and n as in :class:`Factors`). Synchronises once."""
    return Factors(S=S, C=C, n=n, slots_written=int(n.max()) if n.numel() else 0)


def coefficient_width(memory: int) -> int:
    """Row length of C: M rounded up to 16, so that rows are whole vectors."""
    return (memory + 15) // 16 * 16


def row_width(D: int, device: torch.device) -> int:
    """Row length of S: on a GPU D rounded up to 16 elements, so that loads stay 16 bytes wide."""
    return (D + 15) // 16 * 16 if on_gpu(device) else D


def check_start(z0: Tensor, memory: int, factor_dtype: torch.dtype | None, eta: float, S: Tensor | None) -> torch.dtype:
    """The factor dtype that is meant; ValueError for an argument that :func:`~.dispatch.new_state` does not take."""
    if z0.dim() != 2 or z0.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"expected z0 of shape (B, D) in float32 or float64, got {tuple(z0.shape)} in {z0.dtype}")
    if memory < 1:
        raise ValueError(f"expected memory >= 1, got {memory}")
    if not 0 <= eta < 1:
        raise ValueError(f"expected 0 <= eta < 1, got {eta}")
    if factor_dtype is None:
        factor_dtype = z0.dtype if S is None else S.dtype
    if factor_dtype not in FACTOR_DTYPES:
        raise ValueError(f"expected factor_dtype among {FACTOR_DTYPES}, got {factor_dtype}")
    return factor_dtype


def check_given(z0: Tensor, memory: int, factor_dtype: torch.dtype, S: Tensor | None, C: Tensor | None) -> None:
    """ValueError for buffers that are not as :func:`~.dispatch.new_state` wants them."""
    (B, D), device = z0.shape, z0.device
    if S is not None:
        dense = S.stride(2) == 1 and S.stride(0) == (memory + 1) * S.stride(1) if S.dim() == 3 and S.numel() else True
        if S.shape != (B, memory + 1, D) or S.dtype != factor_dtype or S.device != device or not dense:
            raise ValueError(
                f"expected S of shape {(B, memory + 1, D)} in {factor_dtype} on {device}, rows dense and evenly spaced, got "
                f"{tuple(S.shape)} in {S.dtype} on {S.device} with strides {S.stride()}"
            )
    if C is not None:
        shape = (B, memory, coefficient_width(memory))
        if C.shape != shape or C.dtype != z0.dtype or C.device != device or not C.is_contiguous():
            raise ValueError(
                f"expected C contiguous, {shape} in {z0.dtype} on {device}, got {tuple(C.shape)} in {C.dtype} on {C.device} "
                f"with strides {C.stride()}"
            )


def _dense(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised; on a CPU from the workspace, where memory that was used before has no pages to be faulted in."""
    return workspace.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def new_factors(z0: Tensor, memory: int, factor_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S and C for a batch like ``z0`` (B, D), uninitialised."""
    (B, D), device = z0.shape, z0.device
    row = row_width(D, device)
    shapes = ((B, memory + 1, row), factor_dtype), ((B, memory, coefficient_width(memory)), z0.dtype)
    S, C = (_dense(shape, dtype, device) for shape, dtype in shapes)
    return S if row == D else S[:, :, :D], C


def new_aten_state(z0: Tensor, S: Tensor, C: Tensor, *, eta: float, tol: float, relative: bool, floor: float) -> BroydenState:
    """A state for the lockstep implementation; C is cleared."""
    return BroydenState(
        S=S,
        C=C.zero_(),
        n=torch.zeros(z0.shape[0], dtype=torch.int32, device=z0.device),
        eta=eta,
        **progress_fields(z0, tol, relative, floor),
    )
