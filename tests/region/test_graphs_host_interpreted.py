"""What a call costs the host on a GPU: operators outside replays, and what it waits for. Rehearsed as test_graphs_interpreted.py.

Needs TRITON_INTERPRET=1 from the start: tests/kernels/test_triton.py runs it in a process of its own.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import rehearse
from deq_compile import record_solves
from deq_compile.kernels.broyden import gpu as broyden_gpu
from deq_compile.kernels.gcr import gpu as gcr_gpu
from deq_compile.region import graphs, op, verdict
from deq_compile.region.compiled import CompiledRunner
from tests.models.attached import WithHook
from tests.region.rehearsed_loops import Loop

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, interpreted")

MOST_FORWARD, MOST_BACKWARD = 15, 60


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


class Operators(TorchDispatchMode):
    """Counts operators, but for those of replays and of kernels: what the host has to do itself in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.aside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.aside:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Operators]]:
    """The operators of the last forward and backward of a region."""
    from triton.runtime import interpreter

    found: dict[str, Operators] = {}
    inside: list[Operators] = []

    def aside(work: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for mode in inside:
                mode.aside += 1
            try:
                return work(*args, **kwargs)
            finally:
                for mode in inside:
                    mode.aside -= 1

        return wrapped

    def count(name: str) -> None:
        work = getattr(op.run, name)

        def wrapped(*args: Any) -> Any:
            with Operators() as mode:
                found[name] = mode
                inside.append(mode)
                try:
                    return work(*args)
                finally:
                    inside.remove(mode)

        monkeypatch.setattr(op.run, name, wrapped)

    for kind in (rehearse.RehearsedGraph, rehearse._While):
        monkeypatch.setattr(kind, "replay", aside(kind.replay))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", aside(interpreter.GridExecutor.__call__))
    count("run_forward")
    count("run_backward")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield found


def test_a_captured_call_dispatches_few_operators(device: type[rehearse.RehearsalDevice], counted: dict[str, Operators]) -> None:
    model = Loop(16)
    options = {"inner": "aot_eager", "tol": 1e-3, "max_iter": 8, "verify": "never", "engine": "while", "reuse": "always"}
    call = torch.compile(model, backend="deq", options=options)
    for _ in range(4):
        call(torch.randn(2, 16)).square().sum().backward()
    assert [h.name for h in graphs.held(graphs.CapturedForward)] == ["while"]
    assert [h.name for h in graphs.held(graphs.CapturedAdjoint)] == ["while"]
    forward, backward = (counted[name].seen for name in ("run_forward", "run_backward"))
    assert forward.total() <= MOST_FORWARD, forward
    assert backward.total() <= MOST_BACKWARD, backward


class Slow:
    """An event of a device that is behind: it has not come, until somebody waits."""

    waited = 0
    come = False

    def record(self) -> None:
        Slow.come = False

    def query(self) -> bool:
        return Slow.come

    def synchronize(self) -> None:
        Slow.waited += 1
        Slow.come = True


def test_inference_waits_for_nothing(device: type[rehearse.RehearsalDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of the device, by at most `MOST_PENDING` calls; and no miss is lost on the way."""
    monkeypatch.setattr(device, "event", lambda self: Slow())
    monkeypatch.setattr(Slow, "waited", 0)
    model = Loop(16)
    nn.init.orthogonal_(model.W.weight, gain=0.1)
    call = torch.compile(model, backend="deq", options={"inner": "aot_eager", "tol": 1e-3, "max_iter": 6, "verify": "first"})
    x = torch.randn(2, 16)
    with torch.no_grad():
        for _ in range(1 + verdict.MOST_PENDING):
            call(x)
        assert Slow.waited == 0
        call(x)
        assert Slow.waited == 1
        for _ in range(3):
            call(x)
        model.W.weight.mul_(10.0)
        call(x)
        model.W.weight.div_(10.0)
        for _ in range(3):
            call(x)
        Slow.come = True
        with pytest.warns(UserWarning, match=r"missed tol=0.001"):
            call(x)
    assert Slow.waited == 2


def test_a_declared_fixed_point_waits_once_and_last(
    device: type[rehearse.RehearsalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands behind it, so the host has to hear what the solve came to; by then the attached step is enqueued."""
    order: list[str] = []

    class Watched(Slow):
        def synchronize(self) -> None:
            order.append("wait")
            super().synchronize()

    apply = CompiledRunner.apply

    def evaluated(self: CompiledRunner, *args: Any) -> torch.Tensor:
        order.append("body")
        return apply(self, *args)

    monkeypatch.setattr(device, "event", lambda self: Watched())
    monkeypatch.setattr(CompiledRunner, "apply", evaluated)
    model, x = WithHook(), torch.randn(2, 16)
    nn.init.orthogonal_(model.f.W.weight, gain=0.1)
    call = torch.compile(model, backend="deq", options={"inner": "aot_eager", "tol": 1e-3, "max_iter": 8})
    for _ in range(2):
        call(x)
    (held,) = graphs.held(graphs.CapturedForward)
    order.clear()
    with record_solves() as solves:
        found = call(x)
    assert held.name == "while"
    assert order == ["body"] * (solves[0].iterations_max + 1) + ["wait"]
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wanted", ["while", "chunks"])
def test_a_graph_compiles_its_own_variants_only(
    wanted: str, device: type[rehearse.RehearsalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling a step takes seconds. Warming up runs the body, and of the kernels what the graph is going to launch."""
    seen: set[tuple[str, bool, bool]] = set()

    def spy(launch: Any) -> Any:
        def logged(state: Any, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
            if not state.idling and "COND" in constants:
                seen.add((kernel.fn.__name__, constants.get("INDIRECT", state.table is not None), constants["COND"]))
            launch(state, kernel, grid, *args, **constants)

        return logged

    for module in (broyden_gpu, gcr_gpu):
        monkeypatch.setattr(module, "launch", spy(module.launch))
    model = Loop(16)
    options = {"inner": "aot_eager", "tol": 1e-3, "max_iter": 8, "verify": "never", "engine": wanted, "reuse": "always"}
    call = torch.compile(model, backend="deq", options=options)
    for _ in range(4):
        call(torch.randn(2, 16)).square().sum().backward()
    in_graphs = {(name, conditional) for name, captured, conditional in seen if captured}
    assert in_graphs == {(name, wanted == "while") for name in ("step_fused", "project", "extend")}
