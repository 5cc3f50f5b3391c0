"""Good Broyden with H_0 = -I (:mod:`deq_compile.kernels.broyden`), whose factors the backward uses; and with a shared H_0."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_compile.kernels import broyden
from deq_compile.kernels.broyden import BroydenState, Factors
from deq_compile.kernels.iteration import Progress

from .base import SOLVERS, Problem, Solver


class Broyden(Solver):
    """z <- z - H (f(z) - z) with a limited-memory H."""

    name = "broyden"
    leaves_factors = captures = stays = True

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        memory = problem.max_iter if problem.memory is None else problem.memory
        state = broyden.new_state(
            z0, memory, problem.factor_dtype, problem.eta, tol=problem.tol, relative=problem.relative,
            floor=problem.floor(z0.dtype), capacity=problem.capacity,
        )  # fmt: skip
        if not problem.watched:
            state.unwatched()
        return state, state.iterate(z0)

    step = staticmethod(broyden.step)  # type: ignore[assignment]  # the function itself: a call less in every iteration

    def factors(self, progress: Progress) -> Factors | None:
        assert isinstance(progress, BroydenState)
        return progress


class Recycling(Broyden):
    """The same with what others have learnt: it begins with `problem.shared`, and tells `problem.sketch` what it passes."""

    captures = False

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        state, z = super().start(z0, problem)
        assert isinstance(state, BroydenState)
        state.begin_with(z0, problem.shared, problem.sketch)
        return state, z

    def step(self, progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:  # type: ignore[override]
        assert isinstance(progress, BroydenState)
        g = None
        if progress.sketch is not None:
            g = torch.sub(f.to(z.dtype), z, out=progress.spare)
            progress.sketch.note(z, g)
        if progress.shared is None:
            broyden.step(progress, z, f, last=last)
        else:
            broyden.step_shared(progress, z, f, g, last=last)


BROYDEN = SOLVERS.register(Broyden())
Broyden.recycling = Recycling()
