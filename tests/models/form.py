"""What the models of the forms share: a row of the table, a cell, and the loop with a test as a function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deq_compile import Reason

from .parts import D, Linear, contract

TOL = 1e-6
CAP = 300


@dataclasses.dataclass(frozen=True)
class Form:
    """A model and what becomes of it.

    regions  number of solves
    breaks   graph breaks; 0 means that it compiles under fullgraph=True
    refused  why it is left alone, where it is
    kind     what the report calls the region
    implicit the gradient is the implicit one, which the user's own backward approximates
    """

    build: Callable[[], nn.Module]
    regions: int = 1
    breaks: int = 0
    refused: Reason | None = None
    kind: str = "loop until a test"
    shape: tuple[int, ...] = (4, D)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    implicit: bool = False

    def make(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = self.build()
        contract(model)
        return model, torch.randn(self.shape, dtype=torch.float64).float()


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Linear()


def iterate(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """No arguments by which capture would know a solver."""
    for _ in range(CAP):
        z_new = f(z)
        if torch.norm(z_new - z) < TOL:
            return z_new
        z = z_new
    return z
