"""Bodies of the benchmarks, and the demo's model, trained on the handwritten digits: what whole training steps are timed on.

Nothing of deq_compile is imported here: `bench against` trains it with an earlier one.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import problems
from bench.demo_model import WeightTiedClassifier
from bench.gradients.bodies import CLASSES, digits

LEARNING_RATE = 3e-4
# A body of the tables whose matrix is drawn orthogonal: all of its eigenvalues are large, so that solves are long.
ORTHOGONAL, GAIN = "-orthogonal", 0.9
DEMO, DEMO_BATCH = "digits-demo", 64  # the model of `bench demo`


class Classifier(nn.Module):
    """A body of the benchmarks, and a linear layer on what its fixed point is on average over positions."""

    def __init__(self, loop: nn.Module, features: int) -> None:
        super().__init__()
        self.loop, self.head = loop, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.loop(x)
        pooled = z.mean((2, 3)) if z.dim() == 4 else z.flatten(1)
        return self.head(pooled)


def make(name: str) -> tuple[nn.Module, Tensor, Tensor, int]:
    """The model of a problem, or the demo's, digits in the shape of its input, their labels, and the batch size."""
    if name == DEMO:
        torch.manual_seed(0)
        return WeightTiedClassifier(), *digits(), DEMO_BATCH
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


def exact_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of a hundred iterations in float64, by autograd."""
    wide = copy.deepcopy(model).double()
    getattr(wide, "loop", wide).n_iter = 100
    grads = torch.autograd.grad(F.cross_entropy(wide(x.double()), y), list(wide.parameters()))
    return torch.cat([g.flatten() for g in grads])
