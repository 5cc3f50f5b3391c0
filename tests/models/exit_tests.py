"""Loops whose exit depends on data (exits.py): what they test before they end."""

from __future__ import annotations

import torch
from torch import Tensor

from .form import CAP, TOL, Cell


class PerSampleAll(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            err = (z_new - z).norm(dim=-1) / z_new.norm(dim=-1)
            z = z_new
            if torch.all(err < TOL):
                break
        return z


class Allclose(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z_new = self.f(z, x)
        while not torch.allclose(z, z_new, rtol=0.0, atol=TOL):
            z, z_new = z_new, self.f(z_new, x)
        return z_new


class NanGuard(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            res = (z_new - z).norm()
            z = z_new
            if torch.isnan(res):
                break
            if res < TOL:
                break
        return z


class WhileNotDone(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z, done = torch.zeros_like(x), torch.tensor(False)
        while not done:
            z_new = self.f(z, x)
            done = (z_new - z).norm() < TOL
            z = z_new
        return z


class BoolOfTensor(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            done = bool((z_new - z).norm() < TOL)
            z = z_new
            if done:
                break
        return z


class OrDiverged(Cell):
    """Two tests in one condition."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            err = (z_new - z).norm()
            z = z_new
            if err < TOL or torch.isnan(err):
                break
        return z


class MinimumSteps(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            z_new = self.f(z, x)
            err = (z_new - z).norm()
            z = z_new
            if k > 2 and err < TOL:
                break
        return z


class ToleranceIsABuffer(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tol", torch.tensor(TOL))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            err = (z_new - z).pow(2).mean().sqrt()
            z = z_new
            if err < self.tol:
                break
        return z


class TestedEveryFifth(Cell):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for k in range(CAP):
            z_new = self.f(z, x)
            if k % 5 == 0 and (z_new - z).norm() < TOL:
                break
            z = z_new
        return z_new


class FrozenSamples(Cell):
    """Samples that have converged are held where they are: at the end the body is the identity, and has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(CAP):
            z_new = self.f(z, x)
            err = (z_new - z).norm(dim=1, keepdim=True)
            z = torch.where(err < TOL, z, z_new)
            if (err < TOL).all():
                break
        return z
