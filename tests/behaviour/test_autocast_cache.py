"""What autocast remembers of a parameter is never what a solve made of it without gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(8, 8)
        nn.init.orthogonal_(self.lin.weight, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            z = torch.tanh(self.lin(z).float() + x)
        return z + self.lin(z)


@pytest.mark.parametrize("solver", ["auto", "broyden"])
def test_a_layer_that_is_used_behind_its_loop_has_its_whole_gradient(solver: str) -> None:
    model, x = Model(), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    run = torch.compile(model, backend="deq", options={"inner": "eager", "solver": solver})

    def gradients(call: nn.Module) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(x).float().square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients(model)
    for _ in range(2):
        got = gradients(run)
        assert len(got) == 2
        for mine, theirs in zip(got, want, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(x)
        assert model.lin(x).requires_grad
