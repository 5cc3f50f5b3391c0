"""Bodies with several fixed points, or a manifold of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Multistable:
    """`count` times `step`, in the dtype of its argument, from `start(i)`, the i-th batch in float32."""

    step: Callable[[Tensor], Tensor]
    count: int
    start: Callable[[int], Tensor]

    def loop(self, injected: bool) -> Callable[[Tensor], Tensor]:
        """The loop as a user writes it; `injected`: its input enters the body too, at a thousandth."""
        step, count = self.step, self.count

        def plain(x: Tensor) -> Tensor:
            z = x
            for _ in range(count):
                z = step(z)
            return z

        def with_input(x: Tensor) -> Tensor:
            z, e = x, 1e-3 * torch.tanh(x)
            for _ in range(count):
                z = step(z) + e
            return z

        return with_input if injected else plain


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _matrix(seed: int, n: int, norm: float) -> Tensor:
    W = _normal(seed, n, n)
    return W * (norm / torch.linalg.matrix_norm(W, 2))


PATTERNS = F.normalize(_normal(1, 10, 16), dim=1)
RECURRENT = _matrix(3, 24, 2.2)
SYMMETRIC = (lambda W: (W + W.t()) * (1.6 / torch.linalg.matrix_norm(W + W.t(), 2)))(_normal(5, 20, 20))
COUPLINGS = (lambda J: (J + J.t()) / math.sqrt(32))(_normal(7, 16, 16))
PLANE = torch.linalg.qr(_normal(9, 12, 5))[0]


def recall(z: Tensor) -> Tensor:
    """Associative recall: modern Hopfield retrieval, every pattern an attractor (Ramsauer et al., 2021)."""
    p = PATTERNS.to(z.dtype)
    return torch.softmax(12 * z @ p.t(), -1) @ p


def scaling(z: Tensor) -> Tensor:
    """Matrix scaling of a positive matrix: a doubly stochastic one for every start (Sinkhorn & Knopp, 1967)."""
    p = z.abs() + 1e-12
    p = p / p.sum(-1, keepdim=True)
    return p / p.sum(-2, keepdim=True)


def log_scaling(z: Tensor) -> Tensor:
    """The same in logarithms."""
    return F.log_softmax(F.log_softmax(z, -2), -1)


def bistable(z: Tensor) -> Tensor:
    """A map with two attractors an element, weakly coupled."""
    return torch.tanh(2.5 * z + 0.1 * z.roll(1, -1))


def recurrent(z: Tensor) -> Tensor:
    """A damped recurrent net with |W| = 2.2."""
    return 0.5 * z + 0.5 * torch.tanh(z @ RECURRENT.to(z.dtype).t())


def hopfield(z: Tensor) -> Tensor:
    """A continuous Hopfield net: symmetric weights, several minima of its energy."""
    return 0.4 * z + 0.6 * torch.tanh(1.5 * z @ SYMMETRIC.to(z.dtype))


def mean_field(z: Tensor) -> Tensor:
    """Naive mean field of a spin glass at low temperature, damped."""
    return 0.5 * z + 0.5 * torch.tanh(2.0 * z @ COUPLINGS.to(z.dtype))


def projections(z: Tensor) -> Tensor:
    """Alternating projections onto a subspace and a box: the point that is reached depends on the start."""
    Q = PLANE.to(z.dtype)
    return ((z @ Q) @ Q.t()).clamp(-0.2, 0.2)


BODIES = {
    "recall": Multistable(recall, 40, lambda i: _normal(i, 16, 16)),
    "scaling": Multistable(scaling, 60, lambda i: torch.exp(_normal(i, 4, 8, 8, scale=1.0 + i % 3))),
    "log-scaling": Multistable(log_scaling, 60, lambda i: _normal(i, 4, 8, 8, scale=1.0 + i % 3)),
    "bistable": Multistable(bistable, 40, lambda i: _normal(i, 16, 8, scale=0.5)),
    "recurrent": Multistable(recurrent, 150, lambda i: _normal(i, 16, 24)),
    "hopfield": Multistable(hopfield, 150, lambda i: _normal(i, 16, 20)),
    "mean-field": Multistable(mean_field, 200, lambda i: _normal(i, 16, 16, scale=0.3)),
    "projections": Multistable(projections, 80, lambda i: _normal(i, 16, 12)),
}
