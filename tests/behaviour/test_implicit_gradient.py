"""The gradient through a region: implicit, by finite differences, and through the user's loop, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import compiled, largest_error, value_and_grads

EXACT: dict[str, Any] = {"tol": 1e-11, "backward_tol": 1e-10, "backward_max_iter": 60, "max_iter": 60}


class Body(nn.Module):
    """tanh(W z + U x) 40 times; |W| = 0.35, and 0.35^40 is 1e-18."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.W.weight.mul_(0.35 / torch.linalg.matrix_norm(self.W.weight, 2))

    def solve(self, u: Tensor) -> Tensor:
        z = torch.zeros_like(u)
        for _ in range(40):
            z = torch.tanh(self.W(z) + u)
        return z


class Injected(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.solve(self.U(x))


class SharedOutside(Body):
    """The body's weight is used before and after the loop too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.W(self.solve(self.W(x))) @ self.W.weight


class Frozen(Injected):
    """A frozen weight in the body: the gradient of the others does not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.W.weight.requires_grad_(False)


class Aliased(Body):
    """One tensor as two operands, and a view of it as a third."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        y = x.flip(1).flip(1).T.T
        for _ in range(40):
            z = torch.tanh(self.W(z) + 0.5 * x + 0.3 * y + 0.1 * x.view(-1).view_as(x))
        return z


class Tied(Body):
    """The transpose of one weight as the second layer."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = torch.tanh(torch.tanh(self.W(z)) @ self.W.weight + self.U(x))
        return z


class Started(Injected):
    """An initial state that needs a gradient, which is zero at a fixed point."""

    def forward(self, x: Tensor) -> Tensor:
        z = 0.1 * x
        for _ in range(40):
            z = torch.tanh(self.W(z) + self.U(x))
        return z


MODELS: dict[str, Callable[[], nn.Module]] = {
    "injected": Injected, "shared outside": SharedOutside, "frozen": Frozen, "aliased": Aliased, "tied": Tied, "started": Started,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_three_gradients_agree(name: str) -> None:
    model, x = MODELS[name]().double(), torch.randn(3, 6, dtype=torch.float64)
    loop = value_and_grads(model, model, x)
    fast, report = compiled(model, **EXACT)
    value_and_grads(fast, model, x)  # the first call verifies
    implicit = value_and_grads(fast, model, x)
    assert [region.status for region in report.regions] == ["solve"]
    assert largest_error(implicit, loop) < 1e-7  # asked: 1e-4
    # Central differences of the compiled model itself, along a random direction of all that has a gradient.
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = [implicit[1], *(g for g, p in zip(implicit[2:], model.parameters(), strict=True) if p.requires_grad)]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    c = torch.randn(implicit[0].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.add_(d, alpha=sign * 1e-5)
            values.append(float((fast(x) * c).sum()))
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.add_(d, alpha=-sign * 1e-5)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "anderson"}, {"solver": "picard", "max_iter": 60}, {"backward": "unroll", "backward_tol": None}],
    ids=["broyden", "anderson", "picard", "unroll"],
)
def test_gradcheck(options: dict[str, Any]) -> None:
    """Every mode that claims exactness, over input and parameters."""
    model, x = Injected().double(), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    fast, _ = compiled(model, **{**EXACT, **options})
    fast(x).sum().backward()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return fast(x)  # gradcheck moves the parameters themselves

    assert torch.autograd.gradcheck(call, (x, *model.parameters()), eps=1e-6, atol=1e-6, rtol=1e-4)
