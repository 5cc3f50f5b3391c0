"""When a solve may end, where the user's own test decides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deq_compile.kernels.iteration import CONVERGED, FALL, NORM_EPS, RESOLUTION, RUNNING, Progress

from .layout import Layout


class StopTest(Protocol):
    """A test of a whole batch; `key` names what it computes, the same in every process."""

    @property
    def key(self) -> str: ...

    def holds(self, layout: Layout, z: Tensor, f: Tensor, others: Sequence[Any]) -> bool: ...

    def as_tensor(self, layout: Layout, z: Tensor, f: Tensor, others: Sequence[Any]) -> Tensor:
        """The same as a bool tensor of no dimensions, for a loop that is itself part of a graph."""
        ...


@dataclass(frozen=True)
class GraphTest:
    """The user's predicate, as a graph of the state tensors, their images, and some operands and sizes of the region.

    call       call(*z, *f, *others) -> a bool tensor of one element, or a bool
    hash       of what it computes
    when       the value at which the loop ends
    positions  of its own operands among those of the region, sizes after tensors
    """

    call: Callable[..., Any]
    hash: str
    when: bool
    positions: tuple[int, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self.hash, self.when, self.positions)).encode()).hexdigest()[:8]

    def holds(self, layout: Layout, z: Tensor, f: Tensor, others: Sequence[Any]) -> bool:
        return bool(self._said(layout, z, f, others)) is self.when

    def as_tensor(self, layout: Layout, z: Tensor, f: Tensor, others: Sequence[Any]) -> Tensor:
        said = self._said(layout, z, f, others)
        if not isinstance(said, Tensor):
            return torch.full((), bool(said) is self.when, device=z.device)
        true = said.reshape(()) != 0
        return true if self.when else ~true

    def _said(self, layout: Layout, z: Tensor, f: Tensor, others: Sequence[Any]) -> Any:
        own = [others[i] for i in self.positions]
        return self.call(*layout.unflatten(z), *layout.unflatten(f), *own)


@dataclass(frozen=True)
class NormTest:
    """|f(z) - z| of the whole batch, absolute or relative to |f(z)|, is at most `tol`."""

    tol: float
    relative: bool

    @property
    def key(self) -> str:
        return f"norm-{self.tol:g}-{self.relative}"

    def holds(self, layout: Layout, z: Tensor, f: Tensor, others: Sequence[Any]) -> bool:
        return bool(self.as_tensor(layout, z, f, others))

    def as_tensor(self, layout: Layout, z: Tensor, f: Tensor, others: Sequence[Any]) -> Tensor:
        norm = torch.linalg.vector_norm(f - z)
        scale = torch.linalg.vector_norm(f) + NORM_EPS if self.relative else 1.0
        return norm <= self.tol * scale


def any_of(tests: Sequence[StopTest], layout: Layout, others: Sequence[Any]) -> Callable[[Tensor, Tensor], bool] | None:
    """(z, f(z)) -> whether any of the tests ends a solve here; None where there are none."""
    return (lambda z, f: any(test.holds(layout, z, f, others) for test in tests)) if tests else None


def ends_well(start: tuple[Tensor, Tensor], here: tuple[Tensor, Tensor]) -> bool:
    """Whether a test that holds may end a solve: every sample's residual |g| is finite and has fallen, or |f| has kept its size.
    Both are (|g|, |f|), each (B,), of the first and of this evaluation; see ``FALL`` of the kernels."""
    return bool(ends_well_as_tensor(start, here))


def ends_well_as_tensor(start: tuple[Tensor, Tensor], here: tuple[Tensor, Tensor]) -> Tensor:
    """The same as a bool tensor of no dimensions."""
    (g0, f0), (g, f) = start, here
    g = torch.maximum(g, RESOLUTION * torch.finfo(g.dtype).eps * f)
    return ((g <= FALL * g0) | ((f <= 2 * f0) & torch.isfinite(g))).all()


def accept(progress: Progress, z: Tensor, f: Tensor) -> None:
    """End a solve at `z`, whose image is `f` (both (B, D)): every sample that still runs has converged."""
    progress.evaluations += 1
    running = progress.done == RUNNING
    residual = torch.linalg.vector_norm(f - z, dim=1)
    if progress.relative:
        residual = residual / (torch.linalg.vector_norm(f, dim=1) + NORM_EPS)
    progress.best.copy_(torch.where(running, residual.to(progress.best.dtype), progress.best))
    progress.z_best.copy_(torch.where(running[:, None], z, progress.z_best))
    progress.freeze(running, torch.full_like(progress.done, CONVERGED))
