"""What a solver is: how an iteration for z = f(z) begins, and how it moves. One file a solver; `SOLVERS` knows them by name."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.iteration import Progress
from deq_compile.kernels.recycle import Shared, Sketch
from deq_compile.registry import SOLVERS

__all__ = ["FLOOR_EPS", "SOLVERS", "Problem", "Solver"]

# Multiples of the body's eps below which stagnation is the precision's doing.
FLOOR_EPS = 50

STOP_MODES = ("rel", "abs")


@dataclass(frozen=True)
class Problem:
    """What is asked of a solver.

    Attributes:
        tol: residual at which a sample stops.
        stop_mode: the residual is |f(z) - z| / (|f(z)| + 1e-9) ("rel"), or its numerator ("abs").
        max_iter: cap on body evaluations, at least 1.
        memory: updates that Broyden stores before it restarts; None is ``max_iter``.
        factor_dtype: dtype of the stored steps; None is that of the state.
        eta: Powell's guard of Broyden's update.
        body_eps: eps of the precision that the body computes in; None is that of the state's dtype.
        capacity: updates to make room for at first, see :func:`deq_compile.kernels.broyden.new_state`.
        watched: whether a device may be asked how far it is. False: ``max_iter`` evaluations, whatever they come to.
        anderson_memory, anderson_damping: m and beta of "anderson"; others may read them as they like.
        relaxation: b of "reversible".
        recorded: whether the solver's own steps may be differentiated.
        stop: (z, f(z)) -> whether the whole batch may stop here; ``tol`` and the floor stop single samples beside it.
        shared: an inverse Jacobian to begin with, in place of the identity, for a solver that takes one (``recycling``).
        sketch: where such a solver takes down what it passes.

    Raises:
        ValueError: ``stop_mode`` or ``max_iter`` is not as above.
    """

    tol: float = 1e-4
    stop_mode: str = "rel"
    max_iter: int = 40
    memory: int | None = None
    factor_dtype: torch.dtype | None = None
    eta: float = 0.1
    body_eps: float | None = None
    capacity: int | None = None
    watched: bool = True
    anderson_memory: int = 8
    anderson_damping: float = 1.0
    relaxation: float = 0.8
    recorded: bool = False
    stop: Callable[[Tensor, Tensor], bool] | None = None
    shared: Shared | None = None
    sketch: Sketch | None = None

    def __post_init__(self) -> None:
        if self.stop_mode not in STOP_MODES:
            raise ValueError(f"expected stop_mode among {STOP_MODES}, got {self.stop_mode!r}")
        if self.max_iter < 1:
            raise ValueError(f"expected max_iter >= 1, got {self.max_iter}")

    @property
    def relative(self) -> bool:
        return self.stop_mode == "rel"

    def floor(self, dtype: torch.dtype) -> float:
        """Relative residual below which stagnation counts as having converged, for a state of this dtype."""
        return FLOOR_EPS * (torch.finfo(dtype).eps if self.body_eps is None else self.body_eps)


class Solver(abc.ABC):
    """An iteration for z = f(z) on a flat state (B, D); it has no state of its own.

    name            what the option ``solver`` calls it
    leaves_factors  whether a backward can use what its iteration leaves
    captures        whether its step may stand in a CUDA graph
    plain           whether it takes the user's own iterates, z <- f(z)
    stays           whether the solution is where f was evaluated last, once every sample has converged: what that evaluation
                    saves then serves the backward
    recycling       the same solver as one that begins with an inverse Jacobian that others have learnt, and tells what it learns
                    itself; None: there is none
    """

    name: str
    leaves_factors: ClassVar[bool] = False
    captures: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    stays: ClassVar[bool] = False
    recycling: ClassVar[Solver | None] = None

    @abc.abstractmethod
    def start(self, z0: Tensor, problem: Problem) -> tuple[Progress, Tensor]:
        """The iteration before its first evaluation, and the iterate z that `step` moves: a copy of z0 (B, D)."""

    @abc.abstractmethod
    def step(self, progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:
        """Judge f = f(z) with :func:`deq_compile.kernels.broyden.observe` or a kernel that does the same, then move the samples
        that still run. In place.

        Args:
            progress: as `start` made it.
            z: (B, D) current iterates; changed in place. Samples that have stopped keep theirs.
            f: (B, D) body at z, any floating dtype.
            last: no evaluation will follow: samples that would go on get MAX_ITER.
        """

    def factors(self, progress: Progress) -> Factors | None:
        """What the backward may use of an iteration that has ended."""
        return None
