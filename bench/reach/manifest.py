"""What a public model is to the harness: where its code comes from, and how one training step of it is built."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor


def whole(output: Any) -> Tensor:
    """The default `pick`: a model that returns one tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(f"expected a tensor from the model, got {type(output).__name__}. Fix: give the case a `pick`")
    return output


@dataclasses.dataclass
class Case:
    """One model, made and seeded, with its arguments.

    model: a Module or a function, float32.
    args: its positional arguments; floating ones that require a gradient get one.
    pick: the tensor of its output that the loss is made of; the loss is a fixed random weighting of it.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    pick: Callable[[Any], Tensor] = whole


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the table.

    build: `build(tight=False)` makes the case; `tight=True` makes the same model (same weights) with its own solver set to
        converge far below any tolerance: in float64 that is the fixed point, with the gradient that the authors mean.
    repository: owner/name on GitHub; its code lies in FOLDER/owner+name at `commit`.
    package: an installed package in place of a clone, whose version is then named.
    path: folders inside the repository that go on `sys.path`.
    iteration: what iterates, in a few words.
    double: False where the code cannot run in float64; the reference is then its own float32 run.
    """

    name: str
    repository: str
    commit: str
    licence: str
    iteration: str
    build: Callable[[bool], Case]
    path: tuple[str, ...] = ("",)
    package: str = ""
    double: bool = True

    @property
    def folder(self) -> str:
        return self.repository.replace("/", "+")


def models_of(module: str) -> tuple[Model, ...]:
    """The models that a module of drivers lists."""
    return tuple(importlib.import_module(module).MODELS)
