"""What of the engines can be seen without a GPU and without kernels: operands, graph assembly, tags, patches, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.gpu.rehearse import rehearsed
from deq_compile import torch_parts
from deq_compile.config import Options
from deq_compile.kernels.broyden.state import new_factors
from deq_compile.region.graphs.operands import Operands, addresses
from deq_compile.region.layout import layout_of
from deq_compile.report import Report
from deq_compile.rewrite import rewrite


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


class Loop(nn.Module):
    def __init__(self, width: int = 17) -> None:
        super().__init__()
        self.W = nn.Linear(width, width)
        nn.init.orthogonal_(self.W.weight, gain=0.25)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(8):
            z = torch.tanh(self.W(z) + x)
        return z


def test_operands_are_copied_or_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from deq_compile.region.graphs import operands as module

    monkeypatch.setattr(module, "SMALL_BYTES", 64)
    small, large, moving = torch.randn(4), torch.randn(8, 8), torch.randn(8, 8)
    before = addresses([small, large, moving])
    moving = moving.clone()
    held = Operands([small, large, moving], before, frozenset())
    assert held.copied == [0, 2]
    assert held.fixed == [1]
    assert held.load([small, large, moving])
    for mine, given in zip(held.tensors, [small, large, moving], strict=True):
        torch.testing.assert_close(mine, given, rtol=0, atol=0)
    assert not held.load([small, large.clone(), moving])
    assert not held.hopeless
    assert not held.load([small, large.clone(), moving])
    assert held.hopeless
    assert held.moved == {1}  # type: ignore[unreachable]
    assert Operands([small, large], addresses([small, large]), frozenset({1})).copied == [0, 1]


@pytest.mark.parametrize("view", ["expanded", "transposed", "sliced"])
def test_copies_keep_strides(view: str) -> None:
    base = torch.randn(6, 8)
    given = {"expanded": base[:1].expand(5, 8), "transposed": base.t(), "sliced": base[:, ::2]}[view]
    held = Operands([given], addresses([given]), frozenset())
    assert held.load([given])
    assert held.tensors[0].stride() == given.stride()
    torch.testing.assert_close(held.tensors[0], given, rtol=0, atol=0)


def test_the_tag_outlives_aotautograd() -> None:
    """Inductor's graph partition works around operators with this tag."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
    from torch._dynamo.backends.common import aot_autograd

    seen: list[Any] = []

    def compiler(gm: Any, inputs: Any) -> Any:
        seen.extend(n.target for n in gm.graph.nodes if "deq" in str(n.target))
        return make_boxed_func(gm.forward)

    def backend(gm: Any, inputs: Any) -> Any:
        rewrite(gm, Options(inner="eager"), Report())
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(gm, inputs)

    torch.compile(Loop(), backend=backend)(torch.randn(3, 17)).sum().backward()
    assert [str(t) for t in seen] == ["deq.solve.default", "deq.solve_backward.default"]
    assert all(torch.Tag.cudagraph_unsafe in t.tags for t in seen)


def test_bodies_are_no_graphs_of_inductors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the outer mode says: the engines capture."""
    from torch._inductor import config

    seen: list[tuple[bool, bool]] = []

    def inner(gm: Any, inputs: Any) -> Any:
        seen.append((config.triton.cudagraphs, config.graph_partition))
        return lambda args: gm(*args)

    monkeypatch.setattr(torch_parts, "compile_fx_inner", inner, raising=False)
    options = {"inductor": {"triton.cudagraphs": True, "graph_partition": True}, "verify": "never"}
    gm_model = Loop()

    def backend(gm: Any, inputs: Any) -> Any:
        rewrite(gm, Options.from_options(options), Report())
        return gm.forward

    with torch.no_grad():
        torch.compile(gm_model, backend=backend)(torch.randn(3, 17))
    assert seen == [(False, False)]


@pytest.mark.parametrize(("shapes", "row"), [([(3, 17)], 32), ([(2, 4, 16)], 64), ([(5, 3), (5, 2, 7)], 32)])
def test_factors_take_no_more_than_padded_rows(shapes: list[tuple[int, ...]], row: int) -> None:
    """(M + 1) B D elements, D rounded up to 16."""
    layout = layout_of(tuple(shapes), (torch.float32,) * len(shapes), tuple(tuple(range(len(s))) for s in shapes), True, False)
    with rehearsed():
        S, _ = new_factors(layout.flatten([torch.empty(s) for s in shapes]), 40, torch.float32)
    steps = S.untyped_storage().nbytes() // 4
    assert steps == 41 * shapes[0][0] * row
