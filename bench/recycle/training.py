"""Evaluations and products over training with recycled factors, against those without on the same weights, batches and losses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deq_compile
from bench.gradients.bodies import CLASSES, RECIPES, TRAINING_SAMPLES, Recipe, digits
from bench.gradients.train import BATCH
from deq_compile import SolveRecord, fixed_point, record_solves
from deq_compile.testing import jac_reg

LEARNING_RATE = 1e-3
CAP = 60
Body = Callable[[Tensor], Tensor]


def with_it(f: Body, z0: Tensor, **options: Any) -> Tensor:
    """A fixed point whose region recycles; `without` has another body of code, and so a region of its own."""
    return fixed_point(lambda z: f(z), z0, **options)


def without(f: Body, z0: Tensor, **options: Any) -> Tensor:
    return fixed_point(lambda z: f(z), z0, recycle="never", **options)


def begun(body: str, seed: int) -> tuple[Recipe, Tensor, Tensor, nn.Module, nn.Linear, torch.optim.Optimizer]:
    """A training before its first step: recipe, inputs and labels, the body and the layer behind it, and their optimizer."""
    recipe = RECIPES[body]
    deq_compile.reset()
    torch.manual_seed(seed)
    images, labels = digits()
    module, head = recipe.make(), nn.Linear(recipe.width, CLASSES)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=LEARNING_RATE)
    return recipe, recipe.inputs(images), labels, module, head, optimizer


def row(body: str, seed: int, tol: float, recycle: str, steps: int | None = None) -> dict[str, Any]:
    """One training: means over all of its steps, those that decide included, with and without."""
    recipe, inputs, labels, module, head, optimizer = begun(body, seed)
    options = {"tol": tol, "max_iter": CAP, "verify": "first"}
    mine: list[SolveRecord] = []
    theirs: list[SolveRecord] = []
    counts: list[list[int]] = []  # products, with and without: also those by which is decided, and one for the parameters
    begin, loss = time.process_time(), torch.zeros(())
    for _ in range(steps or recipe.steps):
        chosen = torch.randint(0, TRAINING_SAMPLES, (BATCH,))
        x, y = inputs[chosen], labels[chosen]

        counts.append([0, 0])

        def f(z: Tensor, x: Tensor = x, count: list[int] = counts[-1]) -> Tensor:
            image = module(z, x)
            if image.requires_grad:
                image.register_hook(lambda _: _count(count))
            return image

        z0 = torch.zeros(BATCH, recipe.width)
        with record_solves() as solves:
            F.cross_entropy(head(without(f, z0, **options)), y).backward()
        theirs.append(solves[0])
        optimizer.zero_grad()
        counts[-1].reverse()
        with record_solves(tensors=bool(recipe.regularise)) as solves:
            loss = F.cross_entropy(head(with_it(f, z0, recycle=recycle, **options)), y)
            loss.backward()
        if recipe.regularise and solves[0].z is not None:
            (recipe.regularise * jac_reg(lambda z, x=x: module(z, x), solves[0].z)).backward()  # type: ignore[misc]
            solves[0].z = solves[0].w = solves[0].cotangent = None
        mine.append(solves[0])
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return {
        "body": body, "seed": seed, "tol": tol, "recycle": recycle, "steps": len(mine), "loss": float(loss.detach()),
        **_compared("evaluations", [s.evaluations for s in mine], [s.evaluations for s in theirs],
                    [s.recycled for s in mine]),
        **_compared("products", [n for n, _ in counts], [n for _, n in counts],
                    [bool(s.recycled_adjoint) for s in mine]),
        "reused": statistics.mean(bool(s.reused) for s in mine),
        "converged": statistics.mean(s.converged for s in mine),
        "converged without": statistics.mean(s.converged for s in theirs),
        "seconds": time.process_time() - begin,
    }  # fmt: skip


def _count(products: list[int]) -> None:
    products[0] += 1


def _compared(what: str, mine: list[int], theirs: list[int], used: list[bool]) -> dict[str, Any]:
    """Means of a count with and without, of all steps and of those where it was on; and how often that was."""
    on = [(m, n) for m, n, was in zip(mine, theirs, used, strict=True) if was]
    return {
        what: statistics.mean(mine),
        f"{what} without": statistics.mean(theirs),
        f"{what} share on": statistics.mean(used),
        f"{what} where on": statistics.mean(m for m, _ in on) if on else None,
        f"{what} where on, without": statistics.mean(n for _, n in on) if on else None,
    }
