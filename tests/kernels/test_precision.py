"""Autocast around a solver does not reach the solver: its products are those of the state's dtype, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import fixed_point

torch.manual_seed(0)
X = torch.randn(4, 16)
SCALE = torch.linspace(0.4, 0.9, 16).requires_grad_()


def step(z: Tensor) -> Tensor:
    """No product in it that autocast could reach, forward or backward."""
    return torch.tanh(SCALE * z.roll(1, -1) + X)


def run(options: dict[str, Any], dtype: torch.dtype | None) -> list[Tensor]:
    found = []
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        for _ in range(3):
            z = fixed_point(step, torch.zeros(4, 16), tol=1e-5, backward_tol=1e-5, **options)
            found += [z.detach(), *torch.autograd.grad(z.square().sum(), SCALE)]
    return found


@pytest.mark.parametrize(
    "options",
    [{"solver": "broyden"}, {"solver": "anderson"}, {"reuse": "always"}, {"memory": 3, "reuse": "always"}],
    ids=str,
)
def test_autocast_stays_outside(options: dict[str, Any], implementation: str) -> None:
    plain = run(options, None)
    for mine, theirs in zip(run(options, torch.bfloat16), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
