"""A loop whose count is an argument: each value is a frame of its own, with one compiled body between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import Reason, Report
from deq_compile.region.site import site
from tests.helpers import compiled

torch.manual_seed(0)
LAYER = torch.nn.Linear(4, 4).double()
torch.nn.init.orthogonal_(LAYER.weight, gain=0.5)
Model = Callable[..., Tensor]


def counted(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
    return z


def one_more(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(1, n + 2):
        z = torch.tanh(LAYER(z) + x)
    return z


def two_loops(x: Tensor, n: int, m: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(n):
        z = torch.tanh(LAYER(z) + x)
    y = torch.zeros_like(x)
    for _ in range(m):
        y = torch.sin(LAYER(y) + z)
    return y


def rows(x: Tensor, n: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(x.shape[0]):
        z = torch.tanh(LAYER(z) + x)
    return z


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(run: Model, *counts: int) -> list[Tensor]:
    """Value, and the gradients of the input and of the parameters."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    out = run(x, *counts) + 0 * x  # a loop of no iterations has no gradient
    grads = torch.autograd.grad((out * x.detach().cos()).sum(), [x, *LAYER.parameters()], allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def error(run: Model, model: Model, *counts: int) -> float:
    pairs = zip(both(run, *counts), both(model, *counts), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def test_counts_of_one_loop_share_one_compiled_body() -> None:
    run, report = compiled(counted, inner="aot_eager")
    counts = [22, 20, 21, 22]
    assert max(error(run, counted, n) for n in counts) < 1e-4
    assert [r.iterations for r in report.regions] == list(dict.fromkeys(counts))
    shapes = {id(found): found for found in (site(r.key).spec.body.shapes for r in report.regions)}
    assert [found.compiled for found in shapes.values()] == [1]


def test_what_one_count_has_shown_is_not_taken_for_another() -> None:
    """The loop of 30 ends at the fixed point; that of 8 has not converged, and gives its own iterates and their gradient."""
    run, report = compiled(counted)
    assert error(run, counted, 30) < 1e-4
    for n in (8, 3, 1, 0, 8):
        assert error(run, counted, n) < 1e-12
    assert error(run, counted, 30) < 1e-4
    assert {r.iterations: r.status for r in report.regions if r.iterations in (8, 30)} == {30: "solve", 8: "kept"}


def test_past_the_limit_of_recompilations_the_function_runs_as_written() -> None:
    run, report = compiled(counted, fullgraph=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        found = [error(run, counted, n) for n in (20, 21, 22)]
    assert len(report.regions) == 2
    assert found[2] == 0.0


def told(model: Model, *calls: Any) -> list[int]:
    """The lines at which a varying count is told, from the first of the function."""
    run, report = compiled(model)
    first = inspect.getsourcelines(model)[1]
    said = []
    for x, *counts in calls:
        run(x, *counts)
        said.append([s.location.line - first for s in report.skipped if s.reason is Reason.VARYING])
    assert said[0] == []  # the first value tells nothing
    assert _every_line_is_told_once(report)
    return said[-1]


def _every_line_is_told_once(report: Report) -> bool:
    lines = [s.location.line for s in report.skipped]
    return len(lines) == len(set(lines))


@pytest.mark.parametrize("model", [counted, one_more])
def test_an_argument_that_changes_the_count_is_told(model: Model) -> None:
    x = torch.ones(2, 4, dtype=torch.float64)
    assert told(model, (x, 20), (x, 21), (x, 22)) == [2]


def test_of_two_loops_the_one_whose_count_changes_is_told() -> None:
    x = torch.ones(2, 4, dtype=torch.float64)
    assert told(two_loops, (x, 20, 20), (x, 20, 21)) == [5]


def test_a_size_that_counts_a_loop_is_not_told() -> None:
    assert told(rows, *((torch.ones(n, 4, dtype=torch.float64), n) for n in (20, 21, 22))) == []
