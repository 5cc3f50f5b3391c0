"""The gradient of the user's own loop, at the loop's iterates: no adjoint of a fixed point at all."""

from __future__ import annotations

from torch import Tensor

from deq_compile.region.adjoint import AdjointSolution
from deq_compile.region.backward import BACKWARDS, AdjointCall, Backward
from deq_compile.region.body import Linearised


class Unroll(Backward):
    """What autograd would give: the region runs its iterates once more (:func:`~..kept.loop_gradient`)."""

    name = "unroll"
    gradient = "loop"

    def solve(self, linear: Linearised, q: Tensor, call: AdjointCall) -> AdjointSolution:
        raise NotImplementedError("expected a gradient of the loop's own iterates, which is no adjoint at a fixed point")


BACKWARDS.register(Unroll())
