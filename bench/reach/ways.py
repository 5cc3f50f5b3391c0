"""Three ways to run a step: as it is, through Inductor, through deq. One process holds one of them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deq_compile import Report
from deq_compile.testing import Backend

from .manifest import Case

Row = dict[str, Any]
WAYS = ("eager", "inductor", "deq")


def cpu_seconds() -> float:
    """CPU time of this process and of all it has started, compilers included."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def in_float64(case: Case) -> Case:
    """The same case in float64: parameters, buffers, tensors that modules hold as plain attributes, arguments."""
    torch.set_default_dtype(torch.float64)

    def double(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    if isinstance(case.model, nn.Module):
        case.model.double()
        for module in case.model.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor):
                    setattr(module, name, double(value))
    return Case(case.model, pytree.tree_map(double, case.args), case.pick)


class Step:
    """Forward, a loss of fixed random weights, backward; the forward alone where nothing in it has a gradient."""

    def __init__(self, case: Case, call: Callable[..., Any]) -> None:
        self.case, self.call = case, call
        self.weights: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """What gets a gradient: the parameters, by name, and arguments."""
        named = dict(self.case.model.named_parameters()) if isinstance(self.case.model, nn.Module) else {}
        named = {name: value for name, value in named.items() if value.requires_grad}
        given = [value for value in pytree.tree_leaves(self.case.args) if isinstance(value, Tensor) and value.requires_grad]
        return named | {f"argument {i}": value for i, value in enumerate(given)}

    def run(self) -> Tensor:
        for value in self.inputs().values():
            value.grad = None
        value = self.case.pick(self.call(*self.case.args))
        if self.weights is None:
            generator = torch.Generator().manual_seed(7)
            self.weights = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        loss = (value * self.weights).sum() / max(1, value.shape[0] if value.dim() else 1)
        if loss.requires_grad:
            loss.backward()
        return value.detach()

    def gradients(self) -> dict[str, Tensor]:
        return {name: value.grad.detach().clone() for name, value in self.inputs().items() if value.grad is not None}


def compiled(case: Case, way: str, report: Report | None = None) -> Callable[..., Any]:
    """The model as a user of that way would call it."""
    if way == "eager":
        return case.model
    backend = "inductor" if way == "inductor" else Backend(None, report)
    return torch.compile(case.model, backend=backend)


def warm_up(way: str) -> None:
    """Compile something trivial, so that a first step shows the model's compilation and not a compiler's own start."""

    def loop(z: Tensor, w: Tensor) -> Tensor:
        x = z
        for _ in range(8):
            z = torch.tanh(z @ w * 0.1 + x)
        return z

    z, w = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    compiled(Case(loop, (z, w)), way)(z, w).sum().backward()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> Row:
    """Graphs that Dynamo handed over and breaks it made so far, in this process."""
    counters = torch._dynamo.utils.counters
    return {"graphs": int(counters["stats"]["unique_graphs"]), "breaks": sum(counters["graph_break"].values())}


@contextlib.contextmanager
def cache_in(folder: str) -> Iterator[None]:
    """Inductor's cache in that folder from here on, and back."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of this process, and of it with its children."""
    whole, own = cpu_seconds(), time.process_time()
    function()
    return time.process_time() - own, cpu_seconds() - whole
