"""Anderson acceleration of type II (:mod:`deq_compile.kernels.anderson`)."""

from __future__ import annotations

from torch import Tensor

from deq_compile.kernels import anderson
from deq_compile.kernels.iteration import Progress

from .base import SOLVERS, Problem, Solver


class Anderson(Solver):
    """Mixes the last ``anderson_memory`` iterates with weight ``anderson_damping``."""

    name = "anderson"
    stays = True

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        return anderson.new_state(
            z0, problem.anderson_memory, problem.anderson_damping, tol=problem.tol, relative=problem.relative,
            floor=problem.floor(z0.dtype),
        )  # fmt: skip

    step = staticmethod(anderson.step)  # the function itself: a call less in every iteration


ANDERSON = SOLVERS.register(Anderson())
