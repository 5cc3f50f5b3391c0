"""Where each sample of a batched fixed-point iteration stands: codes, constants of the stopping rule, and `Progress`.

All samples advance in lockstep. A sample that stops is *frozen*: its iterate no longer changes, whatever others do. The rule
itself is written once for each language: aten.py (and by masks there), stopping.h (C++), triton_stopping.py; reference.py is the
one to read. Tests hold them all to one table of residual sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def solve_info_of(residual: Tensor, iterations: Tensor, done: Tensor) -> Tensor:
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

    def solve_info(self) -> Tensor:
        """(B, 3) float32: the smallest stopping residual of each sample, the evaluations at which it stopped, and why."""
        return solve_info_of(self.best, self.iterations, self.done)

    def all_converged(self) -> bool:
        """Whether every sample has reached the tolerance itself. Synchronises."""
        return bool((self.done == CONVERGED).all())

    def freeze(self, mask: Tensor, code: Tensor) -> None:
        """Stop the samples of ``mask`` (B,) that still run, each with its ``code`` (B,) int8. Synchronises once."""
        stopped = mask & (self.done == RUNNING)
        torch.where(stopped, code, self.done, out=self.done)
        self.iterations.masked_fill_(stopped, self.evaluations)
        self.active = int((self.done == RUNNING).sum())


def new_progress(z0: Tensor, *, tol: float = 0.0, relative: bool = True, floor: float = 0.0) -> Progress:
    """Progress of an iteration that starts at ``z0`` (B, D) and has seen no evaluation yet."""
    return Progress(**progress_fields(z0, tol, relative, floor))


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
