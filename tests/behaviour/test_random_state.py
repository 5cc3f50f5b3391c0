"""Solving draws nothing from the user's random generator: what a seed gives, a dropout after the loop for instance, stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import explain, fixed_point


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(9, 9), nn.Linear(9, 9)
        nn.init.orthogonal_(self.W.weight, gain=0.25)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(12):
            z = torch.tanh(self.W(z) + self.U(x))
        return z


def train(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Past the calls that compare, probe for a batch and measure the gradient."""
    for _ in range(6):
        call(x).square().sum().backward()


def declared(model: Loop) -> Callable[[Tensor], Tensor]:
    return lambda x: fixed_point(lambda z: torch.tanh(model.W(z) + model.U(x)), torch.zeros_like(x))


WAYS: list[dict[str, Any] | None] = [
    {"inner": "aot_eager"},
    {"inner": "aot_eager", "solver": "anderson"},
    {"inner": "aot_eager", "solver": "picard"},
    {"inner": "eager"},
    None,
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_training_draws_no_random_numbers(options: dict[str, Any] | None) -> None:
    """Compiled, and (None) declared in eager mode."""
    model, x = Loop(), torch.randn(4, 9)
    state = torch.get_rng_state()
    train(declared(model) if options is None else torch.compile(model, backend="deq", options=options), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_explaining_draws_no_random_numbers() -> None:
    model, x = Loop(), torch.randn(4, 9)
    state = torch.get_rng_state()
    explain(model, inner="aot_eager")(x)
    assert torch.equal(torch.get_rng_state(), state)
