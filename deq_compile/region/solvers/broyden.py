"""Good Broyden with H_0 = -I, or a shared H_0 (:mod:`deq_compile.kernels.broyden`), whose factors the backward uses."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_compile.kernels import broyden, workspace
from deq_compile.kernels.broyden import BroydenState, Factors
from deq_compile.kernels.iteration import Progress

from .base import SOLVERS, Problem, Solver


class Broyden(Solver):
    """z <- z - H (f(z) - z) with a limited-memory H."""

    name = "broyden"
    leaves_factors = captures = stays = recycles = True

    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        memory = problem.max_iter if problem.memory is None else problem.memory
        state = broyden.new_state(
            z0, memory, problem.factor_dtype, problem.eta, tol=problem.tol, relative=problem.relative,
            floor=problem.floor(z0.dtype), capacity=problem.capacity,
        )  # fmt: skip
        if not problem.watched:
            state.unwatched()
        state.shared, state.sketch = problem.shared, problem.sketch
        return state, state.iterate(z0)

    def step(self, progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:
        assert isinstance(progress, BroydenState)
        shared, sketch = progress.shared, progress.sketch
        if shared is None and sketch is None:
            broyden.step(progress, z, f, last=last)
            return
        if progress.spare is None:
            progress.spare = workspace.empty(z.shape, z.dtype)
        f = f.to(z.dtype)
        g = torch.sub(f, z, out=progress.spare)
        if sketch is not None:
            sketch.note(z, g)
        if shared is None:
            broyden.step(progress, z, f, last=last)
        else:
            broyden.step_preconditioned(progress, z, f, shared.apply_(g), last=last)

    def factors(self, progress: Progress) -> Factors | None:
        assert isinstance(progress, BroydenState)
        return progress


BROYDEN = SOLVERS.register(Broyden())
