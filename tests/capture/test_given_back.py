"""A loop with a test whose solve cannot pay is given back: its frame is traced again, and Dynamo does with it what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import Reason, record_solves
from deq_compile.region.worth import Work, cost_of_loop, cost_of_solve
from tests.helpers import compiled, largest_error, value_and_grads

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Until(nn.Module):
    """Counts its iterations, on the module."""

    def __init__(self, width: int, gain: float = 0.5) -> None:
        super().__init__()
        self.W, self.rounds = nn.Linear(width, width), 0
        nn.init.orthogonal_(self.W.weight, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        self.rounds = 0
        while self.rounds < 200:
            new = torch.tanh(self.W(z) + x)
            gap = (new - z).norm()
            z = new
            self.rounds += 1
            if gap < 1e-5:
                break
        return z


class Outer(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + 1


def calls(model: nn.Module, x: Tensor, count: int, **options: Any) -> tuple[list[list[str]], Any]:
    """The standing of the regions after each of some training steps, each of which gives the user's result; and the report."""
    right = value_and_grads(model, model, x)
    run, report = compiled(model, fullgraph=False, **options)
    standing = []
    for _ in range(count):
        assert largest_error(value_and_grads(run, model, x), right) < 1e-3
        standing.append([region.status for region in report.regions])
    return standing, report


@pytest.mark.parametrize("nested", [False, True])
def test_small_and_short(nested: bool) -> None:
    """Where the loop stands in a module that is called, the frame that calls it is cut there, and the loop met again, alone."""
    torch.manual_seed(0)
    layer = Until(8)
    model, x = Outer(nn.Linear(8, 8), layer, nn.Linear(8, 8)) if nested else layer, torch.randn(4, 8)
    standing, report = calls(model, x, 7)
    assert standing == [["solve"]] * 3 + [["kept"]] * 4
    assert "a solve costs more than its iterations, by count" in str(report)
    counted = layer.rounds
    model(x)
    assert layer.rounds == counted  # its own count, no solve's


def test_the_report_says_so() -> None:
    torch.manual_seed(0)
    layer = Until(8)
    model = Outer(nn.Linear(8, 8), layer)
    _, report = calls(model, torch.randn(4, 8), 5)
    (said,) = [skipped for skipped in report.skipped if skipped.reason is Reason.TOO_CHEAP]
    assert said.location.file == __file__


@pytest.mark.parametrize("why", ["one graph", "solved once", "recorded"])
def test_not_given_back(why: str) -> None:
    torch.manual_seed(0)
    model, x = Until(8), torch.randn(4, 8)
    options: dict[str, Any] = {"verify": "first"} if why == "solved once" else {}
    run, report = compiled(model, fullgraph=why == "one graph", **options)
    if why == "recorded":
        with record_solves():
            for _ in range(6):
                value_and_grads(run, model, x)
    else:
        for _ in range(6):
            value_and_grads(run, model, x)
    assert [region.status for region in report.regions] == ["solve"]


def test_what_pays() -> None:
    """Prices of published shapes: a layer of 128 x 128 pays from some twenty iterations on, one of 8 x 8 hardly ever."""
    wide, tiny = Work(4.2e6, 5e4, 3, 3), Work(512.0, 100.0, 3, 3)
    assert cost_of_solve(wide, 12, 5, grad=True) < cost_of_loop(wide, 30, grad=True)
    assert cost_of_solve(tiny, 8, 4, grad=True) > cost_of_loop(tiny, 12, grad=True)
    assert cost_of_solve(tiny, 8, 0, grad=False) < cost_of_loop(tiny, 200, grad=False)
