"""Anderson acceleration of type II (:mod:`deq_compile.kernels.anderson`)."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_compile.kernels import anderson
from deq_compile.kernels.iteration import Progress

from .base import SOLVERS, Problem, Solver


class Anderson(Solver):
    """Mixes the last ``anderson_memory`` iterates with weight ``anderson_damping``."""

    name = "anderson"

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        window = anderson.new_state(
            z0, problem.anderson_memory, problem.anderson_damping, tol=problem.tol, relative=problem.relative,
            floor=problem.floor(z0.dtype),
        )  # fmt: skip
        return window, z0.clone(memory_format=torch.contiguous_format)

    def step(self, progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:
        assert isinstance(progress, anderson.AndersonState)
        anderson.step(progress, z, f, last=last)


ANDERSON = SOLVERS.register(Anderson())
