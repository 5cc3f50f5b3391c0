"""What a batched fixed-point iteration keeps: where each sample stands, and the factors Broyden has built.

All samples advance in lockstep, so those that still run have stored equally many steps: the host counts them without a
question to the device. A sample that stops is *frozen*: its iterate and factors no longer change, whatever others do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import workspace
from ..device import on_gpu

# The codes in Progress.done. Those above RUNNING are final.
RUNNING, CONVERGED, FLOOR, MAX_ITER, NONFINITE = range(5)

# Keeps the relative residual finite where f(z) = 0; as in TorchDEQ, so that tolerances mean the same.
NORM_EPS = 1e-9

# Stagnation: best residual not improved by 10 % in 5 iterations while below the floor.
STALL_GAIN = 0.9
STALL_PATIENCE = 5

# A small relative residual |g| / |f| is no fixed point where |f| has grown without bound: on a map such as z + g(norm(z)) an
# accelerated solver runs to infinity, where |g| is what it was. So |g| itself must have fallen against the first evaluation, or
# |f| must have kept its size: |g| <= FALL * ceiling with ceiling = max(|g_0|, 2 tol / FALL * |f_0|). Where |f*| is up to
# FALL / tol times |f_0|, a thousand times at the default tolerance, nothing changes. At a floor as coarse as bfloat16's half
# will do: a slow body ends there at |g| = 0.01 |f|, wherever it started. Where |f| is so large that f - z has lost its digits,
# |g| is not known to be less than RESOLUTION eps |f|.
FALL = 0.1
FALL_AT_COARSE_FLOOR = 0.5
COARSE = 0.1
RESOLUTION = 2.0

COMPUTE_DTYPES = (torch.float32, torch.float64)
FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(kw_only=True, eq=False)
class Factors:
    """The inverse-Jacobian estimate H = -(I + S[1:]^T C S[:-1]) of each sample, as steps (Kelley's product form).

    Two properties let every sample be used with the same slice, whatever its own ``n``: ``S[:, :high]`` is finite, and
    row j of C is zero from j = n - 1 on.

    Attributes:
        S: (B, M+1, D) steps s_0 .. s_{n-1}; compute dtype, bfloat16 or float16. Uninitialised from slot ``high`` on.
        C: (B, M, coefficient_width(M)) lower triangular, compute dtype; columns from M on are padding.
        n: (B,) int32, number of steps stored; n - 1 of them have a row in C.
        high: number of slots of S that have ever been written.
        native: what an implementation remembers of the tensors above.
    """

    S: Tensor
    C: Tensor
    n: Tensor
    high: int = 0
    native: Any = None

    @property
    def memory(self) -> int:
        """M, the number of updates that fit before a restart."""
        return self.C.shape[1]

    def alone(self) -> Factors:
        """The factors without what an iteration keeps beside them, once that has ended. They hold no iterate: whoever computes
        gradients may keep them with the graph that the iterate is a part of."""
        return self


def about_of(residual: Tensor, iterations: Tensor, done: Tensor) -> Tensor:
    """(B, 3) float32 of three tensors (B,)."""
    return torch.stack([residual.float(), iterations, done], dim=1)  # the integers become float32 on the way


@dataclass(kw_only=True, eq=False)
class Progress:
    """Where each sample of a batched fixed-point iteration stands.

    Attributes:
        done: (B,) int8, one of RUNNING, CONVERGED, FLOOR, MAX_ITER, NONFINITE.
        best: (B,) smallest stopping residual so far, inf before the first finite one; compute dtype.
        z_best: (B, D) the iterate it belongs to; the initial one before the first residual, and f of that where the first
            residual is not finite: what a plain iteration has then.
        iterations: (B,) int32, body evaluations at which the sample stopped; 0 while it runs.
        mark: (B,) best residual at the last improvement by ``STALL_GAIN``, once below the floor.
        stall: (B,) int32, evaluations since then.
        ceiling: (B,) what |g| is measured against before a relative residual counts, see ``FALL``; inf where it is not.
        tol: a sample stops when its stopping residual is at most this.
        relative: whether the stopping residual is |g| / (|f| + eps) or |g|.
        floor: relative residual below which stagnation counts as having converged.
        evaluations: body evaluations observed so far.
        active: number of samples that still run.
        near_floor: whether any sample has come below the floor.
    """

    done: Tensor
    best: Tensor
    z_best: Tensor
    iterations: Tensor
    mark: Tensor
    stall: Tensor
    ceiling: Tensor
    tol: float
    relative: bool
    floor: float
    active: int
    evaluations: int = 0
    near_floor: bool = False

    @property
    def running(self) -> bool:
        """Whether any sample still runs."""
        return self.active > 0

    @property
    def frozen(self) -> bool:
        """Whether any sample has stopped."""
        return self.active < self.done.shape[0]

    @property
    def fall_at_floor(self) -> float:
        """The part of the ceiling that |g| has to fall to, where it stagnates at the precision's floor."""
        return FALL_AT_COARSE_FLOOR if self.floor > COARSE else FALL

    def ceiling_at(self, norm: Tensor, scale: Tensor) -> Tensor:
        """(B,) what |g| has to fall from, of |g| and |f| of the first evaluation; see ``FALL``. An absolute tolerance needs no
        fall: there it keeps a residual without digits from counting."""
        at_floor = 2 * self.floor / self.fall_at_floor
        if self.relative:
            return torch.maximum(norm, max(2 * self.tol / FALL, at_floor) * scale)
        return torch.maximum(norm, at_floor * scale).clamp_(min=self.tol / FALL)

    def about(self) -> Tensor:
        """(B, 3) float32: the smallest stopping residual of each sample, the evaluations at which it stopped, and why."""
        return about_of(self.best, self.iterations, self.done)

    def all_converged(self) -> bool:
        """Whether every sample has reached the tolerance itself. Synchronises."""
        return bool((self.done == CONVERGED).all())

    def freeze(self, mask: Tensor, code: Tensor) -> None:
        """Stop the samples of ``mask`` (B,) that still run, each with its ``code`` (B,) int8. Synchronises once."""
        stopped = mask & (self.done == RUNNING)
        torch.where(stopped, code, self.done, out=self.done)
        self.iterations.masked_fill_(stopped, self.evaluations)
        self.active = int((self.done == RUNNING).sum())


@dataclass(kw_only=True, eq=False)
class BroydenState(Progress, Factors):
    """State of a batched Broyden iteration.

    Attributes:
        eta: Powell's guard: an update whose denominator is below eta in magnitude is damped; 0 for the textbook's.
        count: steps stored by every sample that still runs; equals its ``n``.
        guarded: whether samples were frozen before a restart, so that slots below ``high`` may be in use.
    """

    eta: float
    count: int = 0
    guarded: bool = False

    def unwatched(self) -> None:
        """Do not ask a device how far it is: the iteration goes on to its cap, as somebody else's capture needs."""

    def alone(self) -> Factors:
        return Factors(S=self.S, C=self.C, n=self.n, high=self.high)

    def iterate(self, z0: Tensor) -> Tensor:
        """The iterate to begin with: (B, D), contiguous, equal to the ``z0`` of this state and no other's."""
        return z0.clone(memory_format=torch.contiguous_format)


def factors_of(S: Tensor, C: Tensor, n: Tensor) -> Factors:
    """Factors from the tensors that a finished solve left (S, C and n as in :class:`Factors`). Synchronises once."""
    return Factors(S=S, C=C, n=n, high=int(n.max()) if n.numel() else 0)


def new_progress(z0: Tensor, *, tol: float = 0.0, relative: bool = True, floor: float = 0.0) -> Progress:
    """Progress of an iteration that starts at ``z0`` (B, D) and has seen no evaluation yet."""
    return Progress(**progress_fields(z0, tol, relative, floor))


def coefficient_width(memory: int) -> int:
    """Row length of C: M rounded up to 16, so that rows are whole vectors."""
    return (memory + 15) // 16 * 16


def row_width(D: int, device: torch.device) -> int:
    """Row length of S: on a GPU D rounded up to 16 elements, so that loads stay 16 bytes wide."""
    return (D + 15) // 16 * 16 if on_gpu(device) else D


def check_start(
    z0: Tensor, memory: int, factor_dtype: torch.dtype | None, eta: float, S: Tensor | None
) -> torch.dtype:
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


def new_factors(z0: Tensor, memory: int, factor_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S and C for a batch like ``z0`` (B, D), uninitialised."""
    (B, D), device = z0.shape, z0.device
    row = row_width(D, device)
    shapes = ((B, memory + 1, row), factor_dtype), ((B, memory, coefficient_width(memory)), z0.dtype)
    S, C = (
        workspace.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
        for shape, dtype in shapes
    )
    return S if row == D else S[:, :, :D], C


def new_aten_state(
    z0: Tensor, S: Tensor, C: Tensor, *, eta: float, tol: float, relative: bool, floor: float
) -> BroydenState:
    """A state for the lockstep implementation; C is cleared."""
    return BroydenState(
        S=S,
        C=C.zero_(),
        n=torch.zeros(z0.shape[0], dtype=torch.int32, device=z0.device),
        eta=eta,
        **progress_fields(z0, tol, relative, floor),
    )


def progress_fields(z0: Tensor, tol: float, relative: bool, floor: float) -> dict[str, Any]:
    """The arguments of :class:`Progress` for an iteration that starts at ``z0`` (B, D)."""
    B = z0.shape[0]
    return {
        "done": torch.zeros(B, dtype=torch.int8, device=z0.device),
        "best": z0.new_full((B,), math.inf),
        "z_best": z0.clone(memory_format=torch.contiguous_format),
        "iterations": torch.zeros(B, dtype=torch.int32, device=z0.device),
        "mark": z0.new_full((B,), math.inf),
        "stall": torch.zeros(B, dtype=torch.int32, device=z0.device),
        "ceiling": z0.new_full((B,), math.inf),
        "tol": tol,
        "relative": relative,
        "floor": floor,
        "active": B,
    }

