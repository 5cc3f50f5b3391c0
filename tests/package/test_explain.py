"""What `explain` takes, what it leaves as it was, and what it says where no compiler ever saw the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deq_compile
from deq_compile import Reason, explain

W = torch.linspace(-0.3, 0.3, 16).reshape(4, 4)
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def loop(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(20):
        z = torch.tanh(z @ W + x)
    return z


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        nn.init.orthogonal_(self.cell.weight, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(20):
            z = torch.tanh(self.cell(z) + x)
        return z


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (3, "expected an nn.Module or a function, got 3"),
        (Model, "got the class Model. Fix: explain\\(Model\\(...\\)\\)"),
        ("script", "got TorchScript"),
    ],
)
def test_what_cannot_be_explained_is_refused_at_once(what: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        explain(_script() if what == "script" else what, inner="eager")
    assert torch.compile(Model(), backend="deq", options={"inner": "eager"})(X).shape == X.shape  # the class is as it was


def _script() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(4, 4))


def test_torchscript_is_not_compiled() -> None:
    with pytest.raises(TypeError, match=r"deq_compile: expected .* got TorchScript"):
        deq_compile.deq_compile(_script())


def test_options_are_a_dict_of_known_settings() -> None:
    for options, text in (
        ({"inductor": {"nope": 1}, "inner": "eager"}, r"expected settings of Inductor .*not 'nope'"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
    ):
        with pytest.raises(ValueError, match=text):
            explain(loop, **options)
    with pytest.raises(ValueError, match="expected the options of the 'deq' backend as a dict"):
        deq_compile.Options.from_options("tol")  # type: ignore[arg-type]
    deq_compile.Options.from_options({"inductor": {"max_autotune": True, "triton.cudagraphs": False}})


COMPILED: dict[str, Callable[[], Any]] = {
    "module": lambda: torch.compile(Model(), backend="deq", options={"inner": "eager", "tol": 1e-6}),
    "function": lambda: torch.compile(loop, backend="deq", options={"inner": "eager", "tol": 1e-6}),
    "twice": lambda: torch.compile(torch.compile(Model(), backend="eager"), backend="deq", options={"inner": "eager"}),
    "in place": lambda: deq_compile.deq_compile(Model(), inner="eager", tol=1e-6),
    "decorated": lambda: deq_compile.deq_compile(loop, inner="eager", tol=1e-6),
    "another backend": lambda: torch.compile(Model(), backend="eager"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_looked_into(name: str) -> None:
    model = COMPILED[name]()
    report = explain(model, inner="eager")(X)
    assert [region.kind for region in report.regions] == ["loop of 20"]
    assert model(X).shape == X.shape


def test_a_compiled_model_is_explained_with_its_options() -> None:
    model = torch.compile(loop, backend="deq", options={"inner": "eager", "min_repeats": 50})
    assert not explain(model)(X).regions
    assert explain(model, min_repeats=5)(X).regions  # what is said to explain beats them


def until(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    while True:
        new = torch.tanh(z @ W + x)
        if (new - z).norm() < 1e-5:
            return new
        z = new


def broken(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(20):
        z = torch.tanh(z @ W + x)
        torch._dynamo.graph_break()
    return z


@torch.compiler.disable
def disabled(x: Tensor) -> Tensor:
    return loop(x)


def not_traced(report: deq_compile.Report) -> list[tuple[str, int, str]]:
    found = [s for s in report.skipped if s.reason is Reason.NOT_TRACED]
    assert {s.location.file for s in found} <= {__file__}
    return [(s.location.function, s.location.line, s.detail) for s in found]


def test_a_frame_that_dynamo_gives_up() -> None:
    (told,) = [s for s in explain(broken, inner="eager")(X).skipped if s.reason is Reason.BROKEN]
    assert told.location.line == broken.__code__.co_firstlineno + 4
    assert "Call to `torch._dynamo.graph_break()`" in told.detail
    ((_, _, again),) = not_traced(explain(broken, inner="eager")(X))
    assert "an earlier compilation in this process" in again


def test_a_loop_that_stands_outside() -> None:
    ((name, _, why),) = not_traced(explain(lambda x: disabled(x) + 1, inner="eager")(X))
    assert name == "loop"
    assert "torch.compiler.disable" in why


def test_a_loop_that_another_backend_has_broken_before() -> None:
    """Dynamo looks at such a frame once for all backends (torch 2.11 looks again)."""
    torch.compile(until, backend="eager")(X)
    report = explain(until, inner="eager")(X)
    if not report.regions:
        ((name, _, why),) = not_traced(report)
        assert name == "until"
        assert "whatever its backend" in why
        torch._dynamo.reset()
        report = explain(until, inner="eager")(X)
    assert len(report.regions) == 1
    assert not_traced(report) == []


def test_nothing_is_said_of_models_that_are_compiled() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Model(), Model()])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            torch._dynamo.graph_break()
            return loop(x)

    with torch.no_grad():  # or Dynamo warns of what its own graph break left
        report = explain(Outer(), inner="aot_eager")(X)
    assert len(report.regions) == 3
    assert not_traced(report) == []


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """The mesh of a process group of one rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_a_cell_that_fsdp_shards(one_rank: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model.cell, mesh=one_rank)
    report = explain(model, inner="eager")(X)
    assert [region.status for region in report.regions] == ["solve"]
    assert not report.skipped


def test_a_cell_whose_parameters_only_fsdp_can_gather(one_rank: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model.cell, mesh=one_rank)
    model.cell.set_all_reduce_hook(lambda gradient: None)  # type: ignore[operator]
    report = explain(model, inner="eager")(X)
    assert not report.regions
    (said,) = [skipped for skipped in report.skipped if skipped.reason is Reason.SHARDED]
    assert said.location.file == __file__
    assert said.detail.endswith("it has an all-reduce hook")


def test_layers_that_fsdp_shards_together(one_rank: Any) -> None:
    """FSDP2 has other hooks for several modules at once, which are left to Dynamo."""
    from torch.distributed.fsdp import fully_shard

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(20):
                for cell in self.cells:
                    z = torch.tanh(cell(z) * 0.3 + x)
            return z

    model = Both()
    fully_shard([model.cells[0], model.cells[1]], mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    ((name, _, why),) = not_traced(explain(model, inner="eager")(X))
    assert name == "forward"
    assert "FSDP2 gathers the parameters of" in why
