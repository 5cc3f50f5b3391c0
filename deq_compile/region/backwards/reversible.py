"""The gradient of the reversible iteration's own steps, walked back (:mod:`~..reversal`): no adjoint of a fixed point at all."""

from __future__ import annotations

from torch import Tensor

from deq_compile.region.adjoint import AdjointSolution
from deq_compile.region.backward import BACKWARDS, AdjointCall, Backward
from deq_compile.region.body import Linearised


class Reversed(Backward):
    """What autograd would give for the steps of ``solver="reversible"``, at an evaluation and a product each."""

    name = "reversible"
    gradient = "iteration"

    def solve(self, linear: Linearised, q: Tensor, call: AdjointCall) -> AdjointSolution:
        raise NotImplementedError("expected a gradient of the solver's own steps, which is no adjoint at a fixed point")


BACKWARDS.register(Reversed())
