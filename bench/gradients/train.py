"""Training the bodies of the study, with the package's own solver and an adjoint solved to 1e-2; weights are kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_compile.testing import jac_reg, solve, solve_adjoint

from .bodies import CLASSES, RECIPES, TRAINING_SAMPLES, digits

BATCH = 48


@dataclass
class Trained:
    """A body with its classifier, and the data: f(z) on samples i is `module(z, x[i])`."""

    name: str
    seed: int
    module: nn.Module
    head: nn.Module
    x: Tensor
    y: Tensor
    width: int


def implicit_step(f: Callable[[Tensor], Tensor], z: Tensor, loss: Callable[[Tensor], Tensor], regularise: float = 0.0) -> float:
    """Accumulate the gradients of loss(z*) at z = z* (B, D), by one attached application of f and an adjoint to 1e-2."""
    z = z.detach().requires_grad_()
    fz = f(z)
    out = fz.detach().requires_grad_()
    value = loss(out)
    value.backward()
    assert out.grad is not None

    def vjp(w: Tensor) -> Tensor:
        return torch.autograd.grad(fz, z, w, retain_graph=True)[0]

    found = solve_adjoint(vjp, lambda w: (vjp(w), None), out.grad, None, tol=1e-2, max_iter=20)
    if regularise:
        (regularise * jac_reg(f, z)).backward()
    fz.backward(torch.nan_to_num(found.w))
    return float(value.detach())


def train(name: str, seed: int, cache: Path) -> Trained:
    """The trained body of a recipe; its weights come from `cache` where they were left there."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    images, labels = digits()
    x = recipe.inputs(images)
    module, head = recipe.make(), nn.Linear(recipe.width, CLASSES)
    made = Trained(name, seed, module, head, x, labels, recipe.width)
    # The sources are part of the name: other bodies or another training give other weights.
    sources = "".join((Path(__file__).parent / file).read_text() for file in ("bodies.py", "train.py"))
    file = cache / f"{name}-{seed}-{hashlib.sha256(sources.encode()).hexdigest()[:8]}.pt"
    if file.exists():
        body, classifier = torch.load(file, weights_only=True)
        module.load_state_dict(body)
        head.load_state_dict(classifier)
        return made
    parameters = [*module.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(recipe.steps):
        i = torch.randint(0, TRAINING_SAMPLES, (BATCH,))
        xb, yb = x[i], labels[i]

        def f(z: Tensor, xb: Tensor = xb) -> Tensor:
            return module(z, xb)

        def loss(z: Tensor, yb: Tensor = yb) -> Tensor:
            return F.cross_entropy(head(z), yb)

        z = solve(f, torch.zeros(BATCH, recipe.width), tol=1e-3, max_iter=30).z
        optimizer.zero_grad()
        implicit_step(f, z, loss, recipe.regularise)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    cache.mkdir(parents=True, exist_ok=True)
    torch.save((module.state_dict(), head.state_dict()), file)
    return made
