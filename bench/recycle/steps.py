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

from bench.gradients.bodies import TRAINING_SAMPLES
from bench.trained import LEARNING_RATE, exact_gradient, make
from deq_compile import Report, record_solves
from deq_compile.testing import Backend

OPTIONS = {"semantics": "equilibrium"}  # a trained body may need more than the loop's thirty iterations
GRADIENT_SAMPLES = 3  # batches on which the gradients are compared with those in float64


@dataclass
class Lane:
    """One model in training. `seconds`, `evaluations` and `products` of its steps."""

    model: nn.Module
    compiled: Any
    optimizer: torch.optim.Optimizer
    report: Report
    seconds: list[float]
    evaluations: list[int]
    products: list[int]

    @staticmethod
    def of(model: nn.Module, options: dict[str, Any]) -> Lane:
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
