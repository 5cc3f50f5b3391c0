"""A call leaves nothing for the garbage collector: what it holds goes when it ends, and its memory, still warm, is used again."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import fixed_point


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Linear(8, 8)
        nn.init.orthogonal_(self.W.weight, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(12):
            z = torch.tanh(self.W(z) + x)
        return z


class Declared(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.tanh(self.W(z) + x), torch.zeros_like(x))


def tensors_in_cycles(step: Any) -> int:
    """Tensors that only the collector can free after a step."""
    for _ in range(3):
        step()
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        for _ in range(4):
            step()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects()) - before
    finally:
        gc.enable()
        gc.collect()


@pytest.mark.parametrize("kind", ["compiled", "declared"])
def test_a_step_leaves_no_cycles(kind: str) -> None:
    model: nn.Module = Loop() if kind == "compiled" else Declared()
    options = {"inner": "aot_eager", "verify": "never"}
    call = torch.compile(model, backend="deq", options=options) if kind == "compiled" else model
    x = torch.randn(4, 8, requires_grad=True)

    def step() -> None:
        x.grad = None
        model.zero_grad()
        call(x).sum().backward()

    assert tensors_in_cycles(step) <= 0
