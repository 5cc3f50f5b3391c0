"""The forward solve: evaluate the body, let the solver move, until every sample has stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.iteration import CONVERGED, FALL, NORM_EPS, RESOLUTION, Progress, solve_info_of

from .domain import evaluated
from .modes import without_grad
from .solvers import BROYDEN, SOLVERS, Problem, Solver
from .status import converged
from .stop import accept, ends_well


class Outcome(Protocol):
    """How a captured solve ended, as far as the host may ask."""

    def ready(self) -> bool:
        """Whether the last launch has ended; never waits."""
        ...

    def outcome(self) -> tuple[int, int]:
        """Samples that missed their tolerance, and the most evaluations of any, in the last launch. Waits for that."""
        ...

    def missed_since(self) -> bool:
        """Whether a sample of any launch has missed its tolerance since this was last asked. Waits for the last launch."""
        ...


_READ_OFF = {"status": "done", "iterations": "iterations", "residual": "best"}


@dataclass(frozen=True, eq=False)
class Solution:
    """Outcome of :func:`solve`.

    Attributes:
        z: (B, D) each sample's iterate of smallest residual, a new tensor.
        state: the factors for the backward; None where the solver builds none.
        status: (B,) int8, values of :class:`~deq_compile.region.status.Status`.
        iterations: (B,) int32, body evaluations at which each sample stopped.
        residual: (B,) stopping residual at ``z``; inf where none was finite.
        evaluations: body evaluations of the whole batch; 0 where only the device knows.
        progress: the iteration that ended so; `status`, `iterations` and `residual` may be read off it when somebody asks.
        outcome: of a captured solve, which may still be running; None where nothing is pending.
        raised: what the body has raised at an iterate of the solver's, which ended the solve; "" where it has not.
    """

    z: Tensor
    state: Factors | None
    status: Tensor
    iterations: Tensor
    residual: Tensor
    evaluations: int
    outcome: Outcome | None = None
    raised: str = ""
    progress: Any = field(default=None, init=False)

    @staticmethod
    def of(
        progress: Any, state: Factors | None, z: Tensor | None = None, outcome: Outcome | None = None, raised: str = ""
    ) -> Solution:
        """What an iteration came to: a :class:`Progress`, or what stands for that after a captured solve."""
        found = object.__new__(Solution)
        z = progress.z_best if z is None else z
        found.__dict__.update(z=z, state=state, evaluations=progress.evaluations, outcome=outcome, progress=progress)
        if raised:
            found.__dict__["raised"] = raised
        return found

    def without_tensors(self) -> Solution:
        """The same without iterate and factors, to be held while its outcome is not known."""
        return Solution.of(self.progress, None, z=self.residual, outcome=self.outcome)

    def __getattr__(self, name: str) -> Tensor:
        source = _READ_OFF.get(name)
        if source is None:
            raise AttributeError(f"'Solution' object has no attribute {name!r}")
        found: Tensor = getattr(self.progress, source)
        self.__dict__[name] = found
        return found

    def solve_info(self) -> Tensor:
        """(B, 3) float32: the stopping residual and the iterations of each sample, and its status."""
        return solve_info_of(self.residual, self.iterations, self.status) if self.progress is None else self.progress.solve_info()

    def all_converged(self) -> bool:
        """Whether every sample is known to have reached the tolerance itself; asks no device of a captured solve."""
        return self.progress is not None and self.progress.all_converged()

    def missed(self) -> bool:
        """Whether a sample stopped short of its tolerance. Waits for the device."""
        return self.outcome.outcome()[0] > 0 if self.outcome is not None else not bool(converged(self.status).all())


@without_grad
def solve(
    f: Callable[[Tensor], Tensor], z0: Tensor, problem: Problem | None = None, *, solver: Solver | str = BROYDEN,
    raising: int | None = None, **settings: Any,
) -> Solution:  # fmt: skip
    """Solve z = f(z) for each sample of a batch, without recording gradients.

    A sample stops when its residual is at most ``tol``, stagnates at the floor of the body's precision, or is not
    finite; it is then frozen while the others go on.

    Args:
        f: body, (B, D) -> (B, D). It must not keep its argument, which changes in place afterwards.
        z0: (B, D) initial iterates, float32 or float64; left as it is. Nothing is evaluated where B = 0.
        problem: tolerance, caps and sizes; None: `settings`, which are the fields of a :class:`~.solvers.Problem`.
        solver: one of :data:`~.solvers.SOLVERS`, or its name.
        raising: evaluations, the first ones, whose errors are raised; what f raises in a later one ends the solve as values do
            that are not finite. None: all of them.

    Raises:
        ValueError: an argument that is not as above, or a body whose result has another shape than its argument.
    """
    if isinstance(solver, str):
        solver = SOLVERS[solver]
    problem = problem or Problem(**settings)
    if problem.shared is not None or problem.sketch is not None:
        solver = solver.recycling or solver
    progress, z = solver.start(z0, problem)
    raised = _iterate(f, z, progress, problem, solver.step, raising)
    return Solution.of(progress, solver.factors(progress), raised=raised)


def _iterate(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    progress: Progress,
    problem: Problem,
    move: Callable[..., None],
    raising: int | None,
) -> str:
    start, stop = None, problem.stop
    while progress.running:
        if raising is None or progress.evaluations < raising:
            fz = f(z)
        else:
            fz, raised = evaluated(f, z)
            if raised:
                move(progress, z, fz, last=True)
                return raised
        if fz.shape != z.shape:
            raise ValueError(f"expected a body that maps {tuple(z.shape)} to itself, got {tuple(fz.shape)}")
        last = progress.evaluations + 1 == problem.max_iter
        if stop is not None:
            here = torch.linalg.vector_norm(fz - z, dim=1), torch.linalg.vector_norm(fz, dim=1)
            start = start or here
            if stop(z, fz):
                if ends_well(start, here):
                    accept(progress, z, fz)
                    return ""
                # A test that holds for NaN holds for ever after; one that holds because |f| has grown may hold again.
                last = last or not bool(torch.isfinite(here[0]).all())
        move(progress, z, fz, last=last)
    return ""


@without_grad
def or_plain(
    found: Solution,
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    cap: int,
    tol: float,
    relative: bool = True,
    stop: Callable[[Tensor, Tensor], bool] | None = None,
) -> Solution:
    """Sample by sample a solve that missed its tolerance, or what at most ``cap`` plain iterations z <- f(z) from z0 (B, D) give.

    For a fixed point that was declared without a loop, where plain iterations stand for the user's own solver. The solve's best
    iterate is taken where its residual |f(z) - z| is no larger than theirs, and has fallen or lies where they come: on a map
    without a fixed point a relative residual falls while |z| grows. The factors stay those of ``found``; the adjoint certifies
    what they are worth at the other's iterate.
    """
    good, z, first = converged(found.status), z0, z0.new_full((z0.shape[0],), math.inf)
    passed = torch.zeros_like(good)
    k = 0
    while k < cap:
        k += 1
        image = f(z).to(z0.dtype)
        norm, size = torch.linalg.vector_norm(image - z, dim=1), torch.linalg.vector_norm(image, dim=1)
        residual = norm / (size + NORM_EPS) if relative else norm
        passed = residual <= tol
        if stop is not None and stop(z, image):
            passed = torch.isfinite(norm)
        first = norm if k == 1 else first
        z = image
        if bool((good | passed).all()):
            break
    far = torch.linalg.vector_norm(found.z, dim=1)
    ours = torch.linalg.vector_norm(f(found.z).to(z0.dtype) - found.z, dim=1)
    ours = torch.maximum(ours, RESOLUTION * torch.finfo(z0.dtype).eps * far)
    reached = far <= 2 * size.nan_to_num(nan=math.inf, posinf=math.inf)
    sound = torch.isfinite(ours) & ~(ours > norm) & ((ours <= FALL * first) | reached)  # also where theirs is NaN
    take = ~good & ~sound
    evaluations = found.evaluations + k + 1
    if not bool(take.any()):
        return replace(found, evaluations=evaluations)
    code = torch.where(passed, torch.full_like(found.status, CONVERGED), found.status)
    return replace(
        found,
        z=torch.where(take[:, None], z, found.z),
        status=torch.where(take, code, found.status),
        iterations=torch.where(take, torch.full_like(found.iterations, k), found.iterations),
        residual=torch.where(take, residual.nan_to_num(nan=math.inf), found.residual),
        evaluations=evaluations,
    )
