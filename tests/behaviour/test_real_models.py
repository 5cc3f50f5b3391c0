"""The small real models of `bench/models`: expected regions or reasons, and value and gradients against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from bench.models import MODELS
from deq_compile import Reason, Report
from tests.helpers import compiled, largest_error

SOLVED = {"mdeq": 4, "deq_transformer": 1, "flow": 1, "graph": 1}  # name: state tensors


def value_and_grads(call: Callable[..., Tensor], model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients of all parameters, in float64; the loss is linear in the output, with random weights."""
    model.zero_grad(set_to_none=True)
    out = call(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out.double() * weights).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [out.detach().double(), *(g.double() for g in grads)]


def run_and_error(name: str) -> tuple[Report, float]:
    model, inputs = MODELS[name]()
    run, report = compiled(model)
    found = value_and_grads(run, model, inputs)
    double = copy.deepcopy(model).double()
    expected = value_and_grads(double, double, [x.double() if x.is_floating_point() else x for x in inputs])
    return report, largest_error(found, expected)


@pytest.mark.parametrize("name", SOLVED)
def test_solved(name: str) -> None:
    report, error = run_and_error(name)
    assert [r.status for r in report.regions] == ["solve"], str(report)
    assert len(report.regions[0].states) == SOLVED[name]
    assert report.skipped == []
    assert error < 2e-3


# torch's own: Dynamo makes an instance of every autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_simulation_is_left_alone() -> None:
    """Thresholds and a surrogate gradient: no region, no difference but float32's."""
    report, error = run_and_error("spiking")
    assert report.regions == []
    assert [s.reason for s in report.skipped] == [Reason.CONTROL_FLOW]
    assert report.skipped[0].location.file.endswith("spiking.py")
    assert error < 1e-5
