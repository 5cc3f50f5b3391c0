"""The gradient of the initial state: never lost where it is the loop's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import compiled, largest_error, reference, value_and_grads


class Balance(nn.Module):
    """Matrix scaling in logarithms, as hyper-connections use it: what it gives depends on the start alone."""

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(20):
            z = F.log_softmax(F.log_softmax(z, -2), -1)
        return z.exp()


class BalanceUntil(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(100):
            new = F.log_softmax(F.log_softmax(z, -2), -1)
            if (new - z).abs().max() < 1e-5:
                break
            z = new
        return z.exp()


class Projected(nn.Module):
    """A learned start beside a learned body, which carries a part of it for ever (its Jacobian has the eigenvalue 1)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start, self.W = nn.Linear(6, 6), nn.Linear(6, 6)
        nn.init.orthogonal_(self.W.weight, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        for _ in range(40):
            z = torch.cat([z[:, :2], torch.tanh(self.W(z))[:, 2:]], 1)
        return z


class Forgotten(Projected):
    """The same where nothing is carried: the start's gradient is nothing."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x)
        for _ in range(40):
            z = torch.tanh(self.W(z) + x)
        return z


class SlowlyForgotten(Projected):
    """After 9 steps of 0.5 a five-hundredth of the start is left in the values' gradient, and it is all that `start` gets."""

    def forward(self, x: Tensor) -> Tensor:
        z = 1e-3 * self.start(x)
        for _ in range(9):
            z = 0.5 * z + 0.1 * torch.tanh(self.W(x))
        return z


@pytest.mark.parametrize("cls", [Balance, BalanceUntil, Projected, SlowlyForgotten])
def test_the_start_gets_the_loops_gradient(cls: type[nn.Module]) -> None:
    model = cls()
    x = torch.randn(8, 4, 4) if cls in (Balance, BalanceUntil) else torch.randn(5, 6)
    run, report = compiled(model, tol=None, backward_tol=None, verify_tol=1e-3)
    expected = reference(model, x)
    for _ in range(4):
        found = value_and_grads(run, model, x)
        assert largest_error(found, expected) < 1e-3
    assert report.regions[0].status == "kept"
    assert ("initial state alone needs a gradient" in str(report)) is (cls in (Balance, BalanceUntil))


def test_a_start_that_is_forgotten_is_solved() -> None:
    model, x = Forgotten(), torch.randn(5, 6)
    run, report = compiled(model)
    found, expected = value_and_grads(run, model, x), reference(model, x)
    assert report.regions[0].status == "solve"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
