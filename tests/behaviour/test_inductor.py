"""Through Inductor and AOTAutograd: compiled bodies, compiled surroundings. Rationed: Inductor takes seconds a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

from deq_compile import Report, explain, record_solves
from deq_compile.backend import Backend
from deq_compile.region.body import BodySpec, EagerRunner
from deq_compile.region.layout import Layout
from deq_compile.region.modes import Ambient
from deq_compile.region.runners import runner_for
from deq_compile.region.shapes import clear
from tests.conftest import InductorCounter
from tests.helpers import TIGHT, compiled, largest_error, reference, value_and_grads
from tests.models.loops import CASES
from tests.models.parts import Case, Linear, Loop


@pytest.fixture(autouse=True)
def _cold() -> Iterator[None]:
    """Graphs are counted, so none may come from a cache on disk."""
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.mark.parametrize("name", ["two_states", "conv", "transformer", "gru", "weight_norm", "no_grad_attached", "cat"])
def test_aot_eager(name: str) -> None:
    """Traced bodies, split by the partitioner; not a second of Inductor."""
    model, x = CASES[name].make()
    run, report = compiled(model, inner="aot_eager")
    assert largest_error(value_and_grads(run, model, x), reference(model, x)) < 2e-3
    assert [r.status for r in report.regions] == ["solve"]


@pytest.mark.parametrize("name", ["layernorm_mlp", "conv"])
def test_inductor(name: str, inductor: InductorCounter) -> None:
    model, x = CASES[name].make()
    run, report = compiled(model, inner="inductor")
    before = inductor.count
    assert largest_error(value_and_grads(run, model, x), reference(model, x)) < 2e-3
    # surroundings forward and backward; body with saved tensors, state VJP, full VJP
    assert inductor.count - before == 5
    assert [r.status for r in report.regions] == ["solve"]


def test_inductor_channels_last_and_autocast() -> None:
    class Mixed(Loop):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = super().forward(x)
            return z.float().flatten(1)

    model, x = Case(lambda: Mixed(CASES["conv"].build().f), 1, shape=(2, 8, 6, 6)).make()
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    run, report = compiled(model, inner="inductor")
    found, eager, exact = value_and_grads(run, model, x), value_and_grads(model, model, x), reference(model, x)
    assert report.regions[0].status == "solve"
    # bf16 flips ReLUs, in eager as well: no farther from float64 than that
    assert largest_error(found, exact) < 1.5 * largest_error(eager, exact)


def test_a_kept_loop_through_inductor() -> None:
    model, x = CASES["linear"].make()
    model.n = 7  # type: ignore[assignment]
    with torch.no_grad():
        model.f.W.weight.mul_(1.8)
    run, report = compiled(model, inner="inductor")
    assert largest_error(value_and_grads(run, model, x), reference(model, x)) < 1e-5
    assert report.regions[0].status == "kept"


def test_one_compiled_body_serves_like_regions(inductor: InductorCounter) -> None:
    """The same body twice in one model, and again in a second model: compiled once."""
    clear()
    f = Linear()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = f

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                z = torch.zeros_like(x)
                for _ in range(30):
                    z = self.f(z, x)
                x = torch.relu(z)
            return x

    x = torch.randn(4, 16)
    with torch.no_grad():
        f.W.weight.mul_(0.5 / torch.linalg.matrix_norm(f.W.weight, 2))
        before = inductor.count
        report = explain(Twice(), inner="inductor")(x)
        assert len(report.regions) == 2
        assert inductor.count - before == 2  # the surroundings, and the one body


def test_graph_cache_and_options_reach_inductor() -> None:
    with pytest.raises(Exception, match="no_such_setting"):
        torch.compile(Loop(Linear()), backend="deq", options={"inductor": {"no_such_setting": 1}})(torch.randn(2, 16))


def vjp_inputs(name: str) -> tuple[Any, ...]:
    torch.manual_seed(0)
    if name == "conv":
        weight = torch.randn(3, 3, 3, 3)
        layout = Layout(((2, 3, 5, 5),), (torch.float32,), ((0, 2, 3, 1),), True)

        def call(z: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            return (torch.tanh(nn.functional.conv2d(z, w, padding=1) + x),)

        return call, layout, [weight, torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)]
    layout = Layout(((4, 6), (4, 2)), (torch.float32, torch.float32), ((0, 1), (0, 1)), True)
    weight = torch.randn(8, 8)

    def call_two(z: Tensor, y: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        out = torch.tanh(torch.cat([z, y], 1) @ w + x)
        return out[:, :6], out[:, 6:]

    return call_two, layout, [weight, torch.randn(4, 8)]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["conv", "two"])
def test_vjps_agree_with_eager(name: str, inner: str) -> None:
    """State VJP, full VJP, a subset of operands, and a second linearisation at another state."""
    call, layout, operands = vjp_inputs(name)
    spec = BodySpec(call, f"vjp-{name}", Ambient.now(), inner)
    runner = runner_for(spec, layout, operands, [])
    eager = EagerRunner(spec, layout, [])
    for needs in ((True, True), (False, True)):
        if inner == "inductor" and needs == (True, True) and name == "two":
            continue  # rationed
        for _ in range(2):
            z, w = torch.randn(layout.batch, layout.width), torch.randn(layout.batch, layout.width)
            torch.testing.assert_close(runner.apply(z, operands), eager.apply(z, operands))
            a, b = runner.linearise(z, operands, needs), eager.linearise(z, operands, needs)
            torch.testing.assert_close(a.vjp(w), b.vjp(w), rtol=1e-4, atol=1e-5)
            (jw, grads), (expected_jw, expected) = a.vjp_full(w), b.vjp_full(w)
            torch.testing.assert_close(jw, expected_jw, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a.vjp(w), jw, rtol=1e-4, atol=1e-5)
            odd = torch.randn(layout.width, layout.batch).t()  # compiled bodies do not check strides
            torch.testing.assert_close(a.vjp(odd), b.vjp(odd), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(runner.apply(odd, operands), eager.apply(odd, operands))


def test_distributed_data_parallel_does_not_cut_a_loop(tmp_path: Any) -> None:
    """Default bucket splitting, with buckets of one weight, so that Dynamo would cut inside the loop."""
    import torch.distributed as dist

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.loop, self.last = nn.Linear(512, 512), Loop(Linear(512), 40), nn.Linear(512, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.loop(self.first(x)))

    def count_graphs(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    graphs: list[torch.fx.GraphModule] = []
    model, x = Case(Head, 1, shape=(4, 512)).make()
    expected = reference(model, x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        torch.compile(parallel, backend=count_graphs)(x)
        assert len(graphs) > 1  # any other backend gets the pieces
        torch._dynamo.reset()
        report = Report()
        run = torch.compile(parallel, backend=Backend(TIGHT, report))
        with record_solves() as solves:
            found = value_and_grads(run, model, x)
        assert (report.graphs, len(report.regions), report.regions[0].iterations) == (1, 1, 40)
        assert len(solves) == 1
        assert largest_error(found, expected) < 2e-3
    finally:
        dist.destroy_process_group()
