"""Whole training steps with one value of an option and with another, in turns, on the same weights and batches.

One model is trained with the first value; the other has its weights before each step. Two that train by themselves drift apart:
of a convolution one lost its contraction, and the ratio said which.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import problems
from bench.gradients.bodies import CLASSES, TRAINING_SAMPLES, digits
from deq_compile import Report, record_solves
from deq_compile.testing import Backend

LEARNING_RATE = 3e-4
# A body of the tables whose matrix is drawn orthogonal: all of its eigenvalues are large, so that solves are long.
ORTHOGONAL, GAIN = "-orthogonal", 0.9
OPTIONS = {"semantics": "equilibrium"}  # a trained body may need more than the loop's thirty iterations
GRADIENT_SAMPLES = 3  # batches on which the gradients are compared with those in float64


class Classifier(nn.Module):
    """A body of the benchmarks, and a linear layer on what its fixed point is on average over positions."""

    def __init__(self, loop: nn.Module, features: int) -> None:
        super().__init__()
        self.loop, self.head = loop, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.loop(x)
        pooled = z.mean((2, 3)) if z.dim() == 4 else z.flatten(1)
        return self.head(pooled)


def make(name: str) -> tuple[Classifier, Tensor, Tensor, int]:
    """The model of a problem, digits in the shape of its input, their labels, and the batch size."""
    loop, x, _ = problems.make(name.removesuffix(ORTHOGONAL))
    if name.endswith(ORTHOGONAL):
        nn.init.orthogonal_(loop.W.weight, gain=GAIN)  # type: ignore[union-attr, arg-type]
    shape = x.shape
    images, labels = digits()
    width = x[0].numel()
    generator = torch.Generator().manual_seed(1)
    lift = torch.randn(64, min(width, 1024), generator=generator) / 8.0
    lifted = (images - images.mean()) @ lift
    inputs = 3 * lifted.repeat(1, -(-width // lifted.shape[1]))[:, :width].reshape(-1, *shape[1:])
    torch.manual_seed(2)
    model = Classifier(loop, shape[1] if len(shape) == 4 else width)
    return model, inputs, labels, shape[0]


@dataclass
class Lane:
    """One model in training. `seconds`, `evaluations` and `products` of its steps."""

    model: Classifier
    compiled: Any
    optimizer: torch.optim.Optimizer
    report: Report
    seconds: list[float]
    evaluations: list[int]
    products: list[int]

    @staticmethod
    def of(model: Classifier, options: dict[str, Any]) -> Lane:
        model, report = copy.deepcopy(model), Report()
        compiled = torch.compile(model, backend=Backend(options, report))
        return Lane(model, compiled, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), report, [], [], [])

    @torch.no_grad()
    def follow(self, other: Lane) -> None:
        """Have the weights of another."""
        for mine, its in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.copy_(its)

    def step(self, x: Tensor, y: Tensor) -> None:
        begin = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.compiled(x), y).backward()
        self.optimizer.step()
        self.seconds.append(time.process_time() - begin)

    def counted(self, x: Tensor, y: Tensor) -> None:
        with record_solves() as solves:
            self.step(x, y)
        self.evaluations.append(sum(s.evaluations for s in solves))
        self.products.append(sum(s.vjps or 0 for s in solves))

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        parameters = list(self.model.parameters())
        grads = torch.autograd.grad(F.cross_entropy(self.compiled(x), y), parameters)
        return torch.cat([g.flatten() for g in grads]).double()


def exact_gradient(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Of a hundred iterations in float64, by autograd."""
    wide = copy.deepcopy(model).double()
    wide.loop.n_iter = 100  # type: ignore[assignment]
    grads = torch.autograd.grad(F.cross_entropy(wide(x.double()), y), list(wide.parameters()))
    return torch.cat([g.flatten() for g in grads])


def measure(problem: str, trained: int, timed: int, option: str, before: str, after: str) -> dict[str, Any]:
    """One row: a step's CPU time with two values of an option after so many steps of training, medians in turns; the gradients'
    errors."""
    torch._dynamo.reset()
    model, inputs, labels, batch = make(problem)
    lanes = {value: Lane.of(model, {option: value, **OPTIONS}) for value in (before, after)}
    generator = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(trained + timed):
            chosen = torch.randint(0, TRAINING_SAMPLES, (batch,), generator=generator)
            order = list(lanes.values())
            order[1].follow(order[0])
            for lane in order if i % 2 else order[::-1]:
                (lane.counted if i % 10 == 9 else lane.step)(inputs[chosen], labels[chosen])
        order[1].follow(order[0])
        errors: dict[str, list[float]] = {value: [] for value in lanes}
        for i in range(GRADIENT_SAMPLES):
            chosen = torch.arange(i * batch, (i + 1) * batch)
            for value, lane in lanes.items():
                exact = exact_gradient(lane.model, inputs[chosen], labels[chosen])
                errors[value].append(float((lane.gradient(inputs[chosen], labels[chosen]) - exact).norm() / exact.norm()))
    one, other = (lane.seconds[trained:] for lane in lanes.values())
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    region, skipped = lanes[after].report.regions[0], trained // 10
    return {
        "problem": problem, "option": option, "before": before, "after": after, "trained": trained, "timed": timed,
        f"ms {before}": 1e3 * statistics.median(one), f"ms {after}": 1e3 * statistics.median(other),
        "speed-up": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4),
        "mean speed-up": sum(one) / sum(other),
        **{f"evaluations {value}": statistics.mean(lane.evaluations[skipped:]) for value, lane in lanes.items()},
        **{f"products {value}": statistics.mean(lane.products[skipped:]) for value, lane in lanes.items()},
        **{f"gradient error {value}": statistics.mean(found) for value, found in errors.items()},
        "uses": region.recycle if option == "recycle" else region.chosen,
    }  # fmt: skip
