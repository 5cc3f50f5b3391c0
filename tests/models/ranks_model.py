"""A small equilibrium model and how it is trained, on ranks and alone; for `ranks_training.py`.

The reference is the user's own loop in eager mode, computed on every rank without any collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deq_compile import Report, fixed_point
from deq_compile.backend import Backend
from tests.helpers import TIGHT

STEPS, EACH, WIDTH = 10, 4, 7  # samples of a rank; 7 rows are no multiple of 2 or 4 ranks
ROUNDS = 24  # 0.4^24 is 3e-10


class Cell(nn.Module):
    """tanh(W z + injected). (B, WIDTH) -> (B, WIDTH)"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.inner.weight, gain=0.4)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + injected)


class Model(nn.Module):
    """x (B, 5) -> (B, 3), by `rounds` iterations of the cell, or by `fixed_point` of it."""

    def __init__(self, declared: bool = False) -> None:
        super().__init__()
        self.declared, self.rounds = declared, ROUNDS
        self.inject, self.cell, self.head = nn.Linear(5, WIDTH), Cell(), nn.Linear(WIDTH, 3)
        self.spare = nn.Linear(WIDTH, 3)  # that no loss depends on

    def forward(self, x: Tensor) -> Tensor:
        injected = self.inject(x)
        z = torch.zeros_like(injected)
        if self.declared:
            return self.head(fixed_point(lambda z: self.cell(z, injected), z, tol=1e-6, backward_tol=1e-5))
        for _ in range(self.rounds):
            z = self.cell(z, injected)
        return self.head(z)


def fresh(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def batch(step: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` samples of a step, the same in every process: (count, 5), (count, 3). Later ones are larger: ranks need different
    numbers of evaluations."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(count, 5, generator=generator), torch.randn(count, 3, generator=generator)
    return x * torch.linspace(0.05, 1.5, count)[:, None], y


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.parameters()), lr=0.05, momentum=0.9)


def shares(step: int, uneven: bool = False) -> list[slice]:
    """Which samples of a step each rank has. `uneven`: in the last step the first rank has one less, and the last one a single
    sample."""
    sizes = [EACH] * dist.get_world_size()
    if uneven and step == STEPS - 1:
        sizes[0], sizes[-1] = EACH - 1, 1
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def stretch(model: nn.Module) -> None:
    """Make the cell so slow that ROUNDS iterations are far from its fixed point: its loop is not to be solved any more."""
    with torch.no_grad():
        model.cell.inner.weight.mul_(0.98 / 0.4)  # type: ignore[union-attr, operator]


def alone(uneven: bool = False, last: bool = True, stretched: int = -1) -> Model:
    """One process, the user's own loop, all samples of each step; without `last` those of the last rank are left out of the last
    step, and its mean is still one over all ranks. Before the step `stretched` the cell becomes slow."""
    model = fresh()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        if step == stretched:
            stretch(model)
        own = shares(step, uneven)
        x, y = batch(step, own[-1].stop)
        count = len(x)
        if step == STEPS - 1 and not last:
            x, y = x[: own[-1].start], y[: own[-1].start]
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum().div(count).backward()
        optimizer.step()
    return model


def loss_of(run: Callable[[Tensor], Tensor], step: int, part: slice | None = None, uneven: bool = False) -> Tensor:
    """This rank's part of a step's loss, such that the mean over the ranks is the mean over the samples."""
    own = shares(step, uneven)
    x, y = batch(step, own[-1].stop)
    mine = own[dist.get_rank()]
    x, y = x[mine][part or slice(None)], y[mine][part or slice(None)]
    return ((run(x) - y) ** 2).sum() * dist.get_world_size() / own[-1].stop


def train(
    run: Callable[[Tensor], Tensor], model: nn.Module, steps: Any = range(STEPS), optimizer: Any = None, uneven: bool = False,
    stretched: int = -1, counts: bool = False,
) -> Any:  # fmt: skip
    """`counts`: each rank makes another number of iterations in each step."""
    optimizer = optimizer or optimizer_of(model)
    for step in steps:
        if counts:
            model.rounds = ROUNDS + (5 * step + 3 * dist.get_rank()) % 11  # type: ignore[assignment]
        if step == stretched:
            stretch(model)
        optimizer.zero_grad()
        loss_of(run, step, uneven=uneven).backward()
        optimizer.step()
    return optimizer


def accumulate(run: Callable[[Tensor], Tensor], steps: Any, optimizer: Any, unreduced: Callable[[], Any]) -> None:
    """Each step in two halves, of which the first is not reduced."""
    for step in steps:
        optimizer.zero_grad()
        with unreduced():
            loss_of(run, step, slice(0, EACH // 2)).backward()
        loss_of(run, step, slice(EACH // 2, None)).backward()
        optimizer.step()


def compiled(model: Any, **options: Any) -> tuple[Any, Report]:
    torch._dynamo.reset()
    report = Report()
    return torch.compile(model, backend=Backend({**TIGHT, **options}, report)), report


def whole(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' parameters, each relative to its norm; parts that nothing depends on are left out."""
    found = []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        mine = whole(p).to(q.dtype)
        if "spare" not in name:
            found.append(float((mine - whole(q)).norm() / whole(q).norm()))
    return max(found)
