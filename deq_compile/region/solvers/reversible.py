"""The reversible iteration of RevDEQ (McCallum, Arora & Foster, arXiv 2509.12917), whose steps the backward walks back.

The paper's two coupled states take turns, y <- (1 - b) y + b f(z) and z <- (1 - b) z + b f(y), from y = z = z0. Numbered in the
order in which they are made they are one sequence of two terms:

    u_{j+1} = (1 - b) u_{j-1} + b f(u_j),    u_{-1} = u_0 = z0,        so    u_{j-1} = (u_{j+1} - b f(u_j)) / (1 - b)

with the paper's z_N = u_{2N} after 2N evaluations. A step back divides what has been rounded by 1 - b. So the terms are held in
float64 whatever f computes in: f is then evaluated where it was, to the last bit, and gives what it gave. Where float64 would not
last, a pair of terms is kept every so many evaluations (`stride_of`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deq_compile.kernels.iteration import NORM_EPS, RUNNING, Progress, observe, progress_fields

from .base import SOLVERS, Problem, Solver

# How far steps back may carry a rounding of float64, for a state in float64 and in anything coarser. `stride_of` takes the worst
# of a contraction, 1 / (1 - b) a step; at b = 0.8 six to ten in two steps were measured, not 25 (NOTES.md, "The reversible
# iteration").
DRIFT, DRIFT_COARSE = 1e-10, 1e-7


@dataclass(frozen=True, eq=False)
class Pair:
    """Two terms after `evaluations` of the body: u_j in `now`, u_{j-1} in `before`, each (B, D) in float64."""

    evaluations: int
    now: Tensor
    before: Tensor


@dataclass(kw_only=True, eq=False)
class ReversibleProgress(Progress):
    """`pair` now; `moves` (B,) int32, the steps each sample has made; `kept`, a pair every `stride` evaluations (0: none)."""

    relaxation: float
    pair: Pair
    moves: Tensor
    stride: int
    kept: list[Pair] = field(default_factory=list)
    last: Tensor | None = None

    def took(self, f: Tensor, residual: Tensor, running: Tensor | None) -> None:
        """Move the samples that were `running` (None: all), whose f (B, D) had this residual (B,)."""
        b, now, before = self.relaxation, self.pair.now, self.pair.before
        made, left = torch.add(before * (1 - b), f.to(torch.float64), alpha=b), now
        if running is not None:
            made, left = torch.where(running[:, None], made, now), torch.where(running[:, None], now, before)
            residual = residual if self.last is None else torch.where(running, residual, self.last)
        self.moves += 1 if running is None else running
        self.pair, self.last = Pair(self.evaluations, made, left), residual
        if self.frozen:  # the last term is the result, and its predecessor's residual the one that is known of it
            ended = self.done != RUNNING
            torch.where(ended[:, None], made.to(self.z_best.dtype), self.z_best, out=self.z_best)
            torch.where(ended, residual.masked_fill(~torch.isfinite(residual), math.inf), self.best, out=self.best)
        if self.stride and self.running and self.evaluations % self.stride == 0:
            self.kept.append(self.pair)


def stride_of(relaxation: float, dtype: torch.dtype) -> int:
    """Evaluations after which a rounding of float64, divided by 1 - b in each step back, has grown to `DRIFT`; at least 1."""
    room = (DRIFT if dtype == torch.float64 else DRIFT_COARSE) / torch.finfo(torch.float64).eps
    return max(1, int(math.log(room) / -math.log1p(-relaxation)))


class Reversible(Solver):
    """u_{j+1} = (1 - b) u_{j-1} + b f(u_j) with b = ``relaxation``. A sample that has stopped takes one step more, as a loop
    does that looks at f(z) - z before it assigns f(z)."""

    name = "reversible"

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        if not problem.watched:
            raise RuntimeError(
                "solver='reversible': expected a call outside of the capture of a CUDA graph, since its end is a question to the "
                "host. Fix: solver='broyden', or no capture"
            )
        fields = progress_fields(z0, problem.tol, problem.relative, problem.floor(z0.dtype))
        start = z0.to(torch.float64, copy=True)
        progress = ReversibleProgress(
            **fields,
            relaxation=problem.relaxation,
            pair=Pair(0, start, start),
            moves=torch.zeros(z0.shape[0], dtype=torch.int32, device=z0.device),
            stride=stride_of(problem.relaxation, z0.dtype) if problem.recorded else 0,
        )
        return progress, z0.clone(memory_format=torch.contiguous_format)

    def step(self, progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:
        assert isinstance(progress, ReversibleProgress)
        f = f.to(z.dtype)
        norm, scale = torch.linalg.vector_norm(f - z, dim=1), torch.linalg.vector_norm(f, dim=1).add_(NORM_EPS)
        running = progress.done == RUNNING if progress.frozen else None
        observe(progress, z, norm, scale, last=last, f=f)
        progress.took(f, norm / scale if progress.relative else norm, running)
        z.copy_(progress.pair.now)


REVERSIBLE = SOLVERS.register(Reversible())
