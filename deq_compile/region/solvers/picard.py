"""Plain iteration, z <- f(z): what the user's own loop does, to where it converges."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_compile.kernels.iteration import NORM_EPS, RUNNING, Progress, new_progress, observe

from .base import SOLVERS, Problem, Solver


class Picard(Solver):
    """z <- f(z), sample by sample until its residual is small."""

    name = "picard"
    plain = stays = True

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        progress = new_progress(z0, tol=problem.tol, relative=problem.relative, floor=problem.floor(z0.dtype))
        return progress, z0.clone(memory_format=torch.contiguous_format)

    def step(self, progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:
        f = f.to(z.dtype)
        scale = torch.linalg.vector_norm(f, dim=1).add_(NORM_EPS)
        observe(progress, z, torch.linalg.vector_norm(f - z, dim=1), scale, last=last, f=f)
        if progress.frozen:
            torch.where((progress.done == RUNNING)[:, None], f, z, out=z)
        else:
            z.copy_(f)


PLAIN = SOLVERS.register(Picard())
