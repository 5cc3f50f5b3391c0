"""Products are traced again where what the compiled forward saves lies in memory otherwise than in the trace, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile.region.program import FixedProgram, Program
from tests.helpers import compiled


@pytest.mark.parametrize("turned", [False, True])
def test_products_are_traced_again_where_layouts_differ(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, retraced = Program._finish, FixedProgram.retrace
    count = 0

    def counting(self: FixedProgram, *args: Any) -> Any:
        nonlocal count
        count += 1
        return retraced(self, *args)

    def finish(self: Program, graph: Any) -> Any:
        call = made(self, graph)
        return lambda inputs: [o.t().contiguous().t() if i and o.dim() == 2 else o for i, o in enumerate(call(inputs))]

    monkeypatch.setattr(FixedProgram, "retrace", counting)
    if turned:
        monkeypatch.setattr(Program, "_finish", finish)
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    nn.init.orthogonal_(layer.weight, gain=0.4)

    def loop(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = torch.tanh(layer(z.reshape(2, 2, 6)).reshape(4, 6) * z.cos() + x)
        return z

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    run, report = compiled(loop, inner="aot_eager", tol=1e-10, backward_tol=1e-10)
    found = torch.autograd.grad(run(x).square().sum(), leaves)
    for mine, exact in zip(found, torch.autograd.grad(loop(x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-9)
    assert [region.status for region in report.regions] == ["solve"]
    assert count == (2 if turned else 0)
