"""What is stepped: a benchmark problem, or a small real model, with its inputs, its loss, and room for gradients."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bench import problems

# After 30 steps of the plain loop the symmetric problems are 5 to 7 % away from their fixed point.
ITERATIONS = {"mlp128sym": 200, "mlp1024sym": 200}
DEFAULT_ITERATIONS = 30
FORMS = ("before", "inside")
OWN_FORM = "own"  # of a real model, which has its loop as it is


@dataclass
class Case:
    """A model with a fixed-point loop, fresh and drawn from one seed.

    name    problem or model
    inject  "before" or "inside": where x enters the loop; "own" for a real model
    n_iter  N of the user's loop; None where the model keeps it to itself
    loop    the model as a `problems.Loop`, whose body a peer can call; None for a real model
    """

    name: str
    inject: str
    n_iter: int | None
    model: nn.Module
    inputs: tuple[Any, ...]
    loop: problems.Loop | None = None
    cotangents: list[Tensor] = field(default_factory=list)

    def loss(self, outputs: Any) -> Tensor:
        """Sum of (output · c) / B over the floating-point outputs, c drawn once from a seed of its own."""
        found = floating(outputs)
        while len(self.cotangents) < len(found):
            generator = torch.Generator().manual_seed(100 + len(self.cotangents))
            like = found[len(self.cotangents)]
            self.cotangents.append(torch.randn(like.shape, generator=generator).to(like.dtype))
        samples = found[0].shape[0] if found[0].dim() else 1
        return torch.stack([(z * c.to(z.dtype)).sum() for z, c in zip(found, self.cotangents, strict=True)]).sum() / samples

    def leaves(self) -> list[Tensor]:
        """All parameters, and the inputs that require gradients."""
        given = [t for t in pytree.tree_leaves(self.inputs) if isinstance(t, Tensor) and t.requires_grad]
        return [*self.model.parameters(), *given]

    def clear(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None

    def gradients(self) -> list[Tensor]:
        """Gradients of `leaves`, float64, detached; zeros where a parameter takes no part."""
        return [torch.zeros_like(t).double() if t.grad is None else t.grad.detach().double().clone() for t in self.leaves()]

    def double(self) -> Case:
        """The same numbers in float64; changes this case, and returns it."""
        self.model.double()

        def cast(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            return leaf.detach().double().requires_grad_(leaf.requires_grad)

        self.inputs = pytree.tree_map(cast, self.inputs)
        self.cotangents = [c.double() for c in self.cotangents]
        return self


def floating(outputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def model_names() -> list[str]:
    """Modules of bench.models that offer ``make() -> (model, inputs)``; none where the folder is missing."""
    try:
        folder = importlib.import_module("bench.models")
    except ImportError:
        return []
    names = []
    for found in pkgutil.iter_modules(folder.__path__):
        if found.name.startswith("_"):
            continue
        try:
            module = importlib.import_module(f"bench.models.{found.name}")
        except ImportError:
            continue
        if hasattr(module, "make"):
            names.append(found.name)
    return names


def known() -> list[str]:
    return [*problems.PROBLEMS, *model_names()]


def forms_of(name: str) -> tuple[str, ...]:
    return FORMS if name in problems.PROBLEMS else (OWN_FORM,)


def load(name: str, inject: str, n_iter: int | None = None) -> Case:
    """A fresh case.

    Raises:
        ValueError: an unknown name.
    """
    if name in problems.PROBLEMS:
        count = n_iter or ITERATIONS.get(name, DEFAULT_ITERATIONS)
        loop, x, c = problems.make(name, count, inject)
        return Case(name, inject, count, loop, (x,), loop, [c])
    if name not in model_names():
        raise ValueError(f"problem: expected one of {', '.join(known())}, got {name!r}")
    torch.manual_seed(0)
    model, inputs = importlib.import_module(f"bench.models.{name}").make()
    given = inputs if isinstance(inputs, tuple) else tuple(inputs) if isinstance(inputs, list) else (inputs,)
    return Case(name, OWN_FORM, None, model, given)
