"""Loops that freeze the samples that have converged, as batched solvers do; and masks that do more, or something else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CAP, TOL = 60, 1e-7


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(8, 8)
        nn.init.orthogonal_(self.W.weight, gain=0.6)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + x)

    def gap(self, new: Tensor, z: Tensor) -> Tensor:
        return (new - z).detach().flatten(1).norm(dim=1) / (1e-9 + new.detach().flatten(1).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for _ in range(CAP):
            new = self.f(z, x)
            gap = self.gap(new, z)
            z = torch.where(done[:, None], z, new)
            done = done | (gap < TOL)
            if done.all():
                break
        return z


class Active(Masked):
    """The other way round, by methods."""

    def forward(self, x: Tensor) -> Tensor:
        z, active = torch.zeros_like(x), torch.ones(len(x), dtype=torch.bool)
        for _ in range(CAP):
            new = self.f(z, x)
            z, old = torch.where(active.unsqueeze(-1), new, z), z
            active = active & (self.gap(z, old) >= TOL)
            if not active.any():
                break
        return z


class FixedCount(Masked):
    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), x.new_zeros(len(x), dtype=torch.bool)
        for _ in range(CAP):
            new = self.f(z, x)
            z, done = torch.where(done.view(-1, 1), z, new), torch.logical_or(done, self.gap(new, z) < TOL)
        return z


class Images(Masked):
    """Three dimensions, and a mask of two."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :].expand(-1, 3, -1)
        z, done = torch.zeros_like(x), torch.zeros(x.shape[:2], dtype=torch.bool)
        for _ in range(CAP):
            new = self.f(z, x)
            gap = (new - z).detach().norm(dim=-1)
            z = torch.where(done.unsqueeze(-1), z, new)
            done = done | (gap < TOL)
            if bool(done.all()):
                break
        return z.sum(1)


class Flags(Masked):
    """The mask is a result too: who has converged."""

    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for _ in range(6):
            new = self.f(z, x)
            gap = self.gap(new, z)
            z = torch.where(done[:, None], z, new)
            done = done | (gap < 0.05)
        return z * done[:, None]


class Counted(Masked):
    """Each sample counts its own iterations."""

    def forward(self, x: Tensor) -> Tensor:
        z, done, n = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x))
        for _ in range(CAP):
            new = self.f(z, x)
            gap = self.gap(new, z)
            n = n + (~done).float()
            z = torch.where(done[:, None], z, new)
            done = done | (gap < TOL)
        return z * n[:, None]


class Grown(Masked):
    """What has grown is frozen, converged or not."""

    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for _ in range(CAP):
            new = self.f(z, x)
            z = torch.where(done[:, None], z, new)
            done = done | (new.norm(dim=1) > 1.0)
        return z


class Started(Masked):
    """Half of the samples never move."""

    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.arange(len(x)) % 2 == 0
        for _ in range(CAP):
            new = self.f(z, x)
            gap = self.gap(new, z)
            z = torch.where(done[:, None], z, new)
            done = done | (gap < TOL)
        return z


class Swapped(Masked):
    """The finished samples go on, the others wait."""

    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for _ in range(CAP):
            new = self.f(z, x)
            gap = self.gap(new, z)
            z = torch.where(done[:, None], new, z)
            done = done | (gap < TOL)
        return z


class ByTheFirst(Masked):
    """All samples are frozen with the first."""

    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for _ in range(8):
            new = self.f(z, x)
            gap = self.gap(new, z)
            z = torch.where(done[0], z, new)
            done = done | (gap < 0.1)
        return z


class ByTheBest(Masked):
    """All samples are frozen with the one that converges first."""

    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for _ in range(8):
            new = self.f(z, x)
            gap = self.gap(new, z)
            z = torch.where(done[:, None], z, new)
            done = done | (gap.min() < 0.1)
        return z


FREEZE = (Masked, Active, FixedCount, Images)
DO_MORE = (Flags, Counted, Grown, Started, Swapped, ByTheFirst, ByTheBest)
