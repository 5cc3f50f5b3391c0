"""Whether the forward's factors are worth their cost to the adjoint: decided by counting, so that equal runs decide alike."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.gcr import move
from deq_compile.region.adjoint import VJP, AdjointProblem, AdjointSolution, begin
from deq_compile.region.counting import ELEMENT, counted
from deq_compile.region.status import AdjointStatus

# An operation of M counts twice: short rows run at half the speed of a matrix product (NOTES.md, "Is M worth it").
OPERATOR_COST = 2
# How far, of the way to the tolerance in digits, an adjoint has to come in half of the products that it may take.
HALF_WAY = 0.4


@torch.no_grad()
def factors_pay(vjp: VJP, q: Tensor, factors: Factors, found: AdjointSolution, problem: AdjointProblem) -> bool:
    """Whether ``found``, made with the factors, saved more than the factors cost. Solves once more, without them.

    A saved product counts with the floating-point operations of its matrix products and convolutions.
    """
    if found.status != AdjointStatus.CONVERGED:
        return True
    plain = products(vjp, q, None, problem)
    if plain is None:
        return True
    product = counted(vjp, q)[0] + ELEMENT * q.numel()
    return (plain - found.needed) * product > OPERATOR_COST * operator_flops(factors.n, q.shape[1], found.needed + 1)


def products(vjp: VJP, q: Tensor, factors: Factors | None, problem: AdjointProblem, contest: bool = False) -> int | None:
    """Products that an adjoint takes with these factors; None where it misses the tolerance. In a `contest` `max_iter` is what
    has to be reached, and what has come less than `HALF_WAY` after half of that is given up."""
    adjoint, count = begin(q, factors, problem, None), 0
    while adjoint.running and not adjoint.converged:
        count += 1
        move(adjoint, vjp(adjoint.w), last=count == problem.max_iter)
        if contest and 2 * count >= problem.max_iter and adjoint.batch > problem.tol**HALF_WAY:
            return None
    return count if adjoint.converged else None


def operator_flops(n: Tensor, D: int, applications: int) -> float:
    """Operations of making M for each sample, and of applying it so many times."""
    steps = n.double()
    return float((steps * steps * D + 4 * steps**3 + 4 * steps * D * applications).sum())
