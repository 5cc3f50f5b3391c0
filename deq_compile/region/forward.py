"""The forward solve: evaluate the body, let the solver move, until every sample has stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from deq_compile.kernels import anderson
from deq_compile.kernels.broyden import (
    CONVERGED,
    FALL,
    NORM_EPS,
    RESOLUTION,
    RUNNING,
    Factors,
    Progress,
    about_of,
    new_progress,
    new_state,
    observe,
    step,
)

from .modes import without_grad
from .status import converged
from .stop import accept, ends_well

# Multiples of the body's eps below which stagnation is the precision's doing.
FLOOR_EPS = 50

SOLVERS = ("broyden", "anderson", "picard")
STOP_MODES = ("rel", "abs")


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
    """

    z: Tensor
    state: Factors | None
    status: Tensor
    iterations: Tensor
    residual: Tensor
    evaluations: int
    outcome: Outcome | None = None
    progress: Any = field(default=None, init=False)

    @staticmethod
    def of(progress: Any, state: Factors | None, z: Tensor | None = None, outcome: Outcome | None = None) -> Solution:
        """What an iteration came to: a :class:`Progress`, or what stands for that after a captured solve."""
        found = object.__new__(Solution)
        z = progress.z_best if z is None else z
        found.__dict__.update(z=z, state=state, evaluations=progress.evaluations, outcome=outcome, progress=progress)
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

    def about(self) -> Tensor:
        """(B, 2) float32: the stopping residual and the iterations of each sample."""
        return about_of(self.residual, self.iterations) if self.progress is None else self.progress.about()

    def all_converged(self) -> bool:
        """Whether every sample is known to have reached the tolerance itself; asks no device of a captured solve."""
        return self.progress is not None and self.progress.all_converged()

    def missed(self) -> bool:
        """Whether a sample stopped short of its tolerance. Waits for the device."""
        return self.outcome.outcome()[0] > 0 if self.outcome is not None else not bool(converged(self.status).all())


@without_grad
def solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    solver: str = "broyden",
    tol: float = 1e-4,
    stop_mode: str = "rel",
    max_iter: int = 40,
    memory: int | None = None,
    factor_dtype: torch.dtype | None = None,
    eta: float = 0.1,
    body_eps: float | None = None,
    room: int | None = None,
    watched: bool = True,
    anderson_memory: int = 5,
    anderson_damping: float = 1.0,
    stop: Callable[[Tensor, Tensor], bool] | None = None,
) -> Solution:
    """Solve z = f(z) for each sample of a batch, without recording gradients.

    A sample stops when its residual is at most ``tol``, stagnates at the floor of the body's precision, or is not
    finite; it is then frozen while the others go on. The residual is |f(z) - z| / (|f(z)| + 1e-9), or its numerator.

    Args:
        f: body, (B, D) -> (B, D). It must not keep its argument, which changes in place afterwards.
        z0: (B, D) initial iterates, float32 or float64; left as it is. Nothing is evaluated where B = 0.
        solver: "broyden" (good Broyden with H_0 = -I, :mod:`deq_compile.kernels.broyden`), "anderson" (type II,
            :mod:`deq_compile.kernels.anderson`) or "picard" (z <- f(z)).
        tol: residual at which a sample stops.
        stop_mode: "rel" or "abs".
        max_iter: cap on body evaluations, at least 1.
        memory: updates that Broyden stores before it restarts; None is ``max_iter``.
        factor_dtype: dtype of the stored steps; None is that of ``z0``.
        eta: Powell's guard of Broyden's update.
        body_eps: eps of the precision that the body computes in; None is that of ``z0``'s dtype.
        room: updates to make room for at first, see :func:`deq_compile.kernels.broyden.new_state`.
        anderson_memory, anderson_damping: m and beta of "anderson".
        watched: whether a device may be asked how far it is. False: ``max_iter`` evaluations, whatever they come to.
        stop: (z, f(z)) -> whether the whole batch may stop here; ``tol`` and the floor stop single samples beside it.

    Raises:
        ValueError: an argument that is not as above, or a body whose result has another shape than its argument.
    """
    if solver not in SOLVERS:
        raise ValueError(f"expected solver among {SOLVERS}, got {solver!r}")
    if stop_mode not in STOP_MODES:
        raise ValueError(f"expected stop_mode among {STOP_MODES}, got {stop_mode!r}")
    if max_iter < 1:
        raise ValueError(f"expected max_iter >= 1, got {max_iter}")
    floor = FLOOR_EPS * (torch.finfo(z0.dtype).eps if body_eps is None else body_eps)
    relative = stop_mode == "rel"
    if solver == "picard":
        z = z0.clone(memory_format=torch.contiguous_format)
        progress = new_progress(z0, tol=tol, relative=relative, floor=floor)
        _iterate(f, z, progress, max_iter, _picard_step, stop)
        return Solution.of(progress, None)
    if solver == "anderson":
        z = z0.clone(memory_format=torch.contiguous_format)
        window = anderson.new_state(z0, anderson_memory, anderson_damping, tol=tol, relative=relative, floor=floor)
        _iterate(f, z, window, max_iter, anderson.step, stop)
        return Solution.of(window, None)
    memory = max_iter if memory is None else memory
    state = new_state(z0, memory, factor_dtype, eta, tol=tol, relative=relative, floor=floor, room=room)
    if not watched:
        state.unwatched()
    _iterate(f, state.iterate(z0), state, max_iter, step, stop)
    return Solution.of(state, state)


def _iterate(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    progress: Progress,
    max_iter: int,
    move: Callable[..., None],
    stop: Callable[[Tensor, Tensor], bool] | None,
) -> None:
    start = None
    while progress.running:
        fz = f(z)
        if fz.shape != z.shape:
            raise ValueError(f"expected a body that maps {tuple(z.shape)} to itself, got {tuple(fz.shape)}")
        last = progress.evaluations + 1 == max_iter
        if stop is not None:
            here = torch.linalg.vector_norm(fz - z, dim=1), torch.linalg.vector_norm(fz, dim=1)
            start = start or here
            if stop(z, fz):
                if ends_well(start, here):
                    accept(progress, z, fz)
                    return
                # A test that holds for NaN holds for ever after; one that holds because |f| has grown may hold again.
                last = last or not bool(torch.isfinite(here[0]).all())
        move(progress, z, fz, last=last)


def _picard_step(progress: Progress, z: Tensor, f: Tensor, *, last: bool) -> None:
    f = f.to(z.dtype)
    scale = torch.linalg.vector_norm(f, dim=1).add_(NORM_EPS)
    observe(progress, z, torch.linalg.vector_norm(f - z, dim=1), scale, last=last, f=f)
    if progress.frozen:
        torch.where((progress.done == RUNNING)[:, None], f, z, out=z)
    else:
        z.copy_(f)


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
