"""What `Hoist` leaves of a body. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_compile.passes.ambient import ambient_at
from deq_compile.region.modes import Ambient
from tests.passes.graphs import captured, one_loop, text


def test_hoisting_keeps_autocast_around_hoisted_work() -> None:
    w, u = torch.randn(4, 4), torch.randn(4, 4)

    def model(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = torch.tanh(z @ w + x @ u).float()
        return z

    graph, loop = one_loop(model, torch.randn(2, 4))
    assert len(loop.hoisted_offsets) == 1
    names = [getattr(n.target, "__name__", n.target) for n in graph.nodes if n.op.startswith("call")]
    enter, leave = names.index("_enter_autocast"), names.index("_exit_autocast")
    assert enter < names.index("matmul") < leave
    assert "_enter_autocast" in text(loop.body.graph)  # type: ignore[union-attr]


def test_ambient_modes() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.sin()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = x.cos()
        return x.tan()

    graph = captured(model, torch.randn(2)).graph
    modes = {n.target: ambient_at(graph, n, Ambient.now()) for n in graph.nodes if n.op == "call_method"}
    off, on = torch.get_autocast_dtype("cpu"), torch.bfloat16
    assert modes["sin"].grad is False
    assert modes["sin"].autocast[0] == ("cpu", False, off)
    assert modes["cos"].autocast[0] == ("cpu", True, on)
    assert modes["tan"] == Ambient.now()
