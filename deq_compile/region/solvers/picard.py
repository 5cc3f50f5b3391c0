"""Plain iteration (:mod:`deq_compile.kernels.picard`): what the user's own loop does, to where it converges."""

from __future__ import annotations

from torch import Tensor

from deq_compile.kernels import picard
from deq_compile.kernels.iteration import Progress

from .base import SOLVERS, Problem, Solver


class Picard(Solver):
    """z <- f(z), sample by sample until its residual is small."""

    name = "picard"
    plain = stays = True

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        return picard.new_state(z0, tol=problem.tol, relative=problem.relative, floor=problem.floor(z0.dtype))

    step = staticmethod(picard.step)  # the function itself: a call less in every iteration


PLAIN = SOLVERS.register(Picard())
