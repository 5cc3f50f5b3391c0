"""Reversible iterations that a user has written by hand: a loop of two coupled states, and Functions whose backward goes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import Reason, record_solves
from tests.helpers import compiled, largest_error, reference, value_and_grads

B, D, b = 4, 8, 0.8
Map = Callable[[Tensor, Tensor], Tensor]


def last_pair(f: Map, x: Tensor, count: int, tol: float = 0.0) -> tuple[Tensor, Tensor]:
    y = z = torch.zeros_like(x)
    for _ in range(count):
        y = (1 - b) * y + b * f(z, x)
        before, z = z, (1 - b) * z + b * f(y, x)
        if tol and (z - before).norm() < tol * z.norm():
            break
    return y, z


def gone_back(f: Map, count: int, pair: tuple[Tensor, Tensor], x: Tensor, weights: tuple[Tensor, ...], q: Tensor) -> list[Tensor]:
    """As the paper's code goes back from the last pair: the gradients of x and of the weights."""
    (y, z), g, h = pair, q, torch.zeros_like(q)
    total = [torch.zeros_like(t) for t in (x, *weights)]
    for _ in range(2 * count):
        with torch.enable_grad():
            u, given = y.detach().requires_grad_(), x.detach().requires_grad_()
            image = f(u, given)
        product, *grads = torch.autograd.grad(image, (u, given, *weights), b * g)
        total = [t + own for t, own in zip(total, grads, strict=True)]
        y, z = (z - b * image.detach()) / (1 - b), y
        g, h = h + product, (1 - b) * g
    return total


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Map, count: int, x: Tensor, *weights: Tensor) -> Tensor:
        y, z = last_pair(f, x, count)
        ctx.f, ctx.count = f, count
        ctx.save_for_backward(y, z, x, *weights)
        return z

    @staticmethod
    def backward(ctx: Any, q: Tensor) -> Any:  # type: ignore[override]
        y, z, x, *weights = ctx.saved_tensors
        return None, None, *gone_back(ctx.f, ctx.count, (y, z), x, tuple(weights), q)


class SetsUp(torch.autograd.Function):
    @staticmethod
    def forward(f: Map, count: int, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return last_pair(f, x, count)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.f, ctx.count, *tensors = inputs
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, _: Tensor, q: Tensor) -> Any:  # type: ignore[override]
        y, z, x, *weights = ctx.saved_tensors
        return None, None, *gone_back(ctx.f, ctx.count, (y, z), x, tuple(weights), q)


class IsGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Map, count: int, y: Tensor, z: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.f, ctx.count = f, count
        ctx.save_for_backward(y, z, x, *weights)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, q: Tensor) -> Any:  # type: ignore[override]
        y, z, x, *weights = ctx.saved_tensors
        return None, None, None, None, *gone_back(ctx.f, ctx.count, (y, z), x, tuple(weights), q)


class Model(nn.Module):
    """A leaky layer; `how` says who makes the iterations."""

    def __init__(self, how: str, count: int = 12, gain: float = 0.6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.count, self.W = how, count, nn.Linear(D, D)
        nn.init.orthogonal_(self.W.weight, gain=gain)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.W(z) + x, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        if how == "saves":
            return Saves.apply(self.f, self.count, x, *self.parameters())  # type: ignore[no-any-return,no-untyped-call]
        if how == "sets up":
            return SetsUp.apply(self.f, self.count, x, *self.parameters())[1]  # type: ignore[no-any-return,no-untyped-call]
        if how == "is given":
            with torch.no_grad():
                y, z = last_pair(self.f, x, self.count)
            return IsGiven.apply(self.f, self.count, y, z, x, *self.parameters())  # type: ignore[no-any-return,no-untyped-call]
        if how == "attached":
            with torch.no_grad():
                y, z = last_pair(self.f, x, self.count)
            y = (1 - b) * y + b * self.f(z, x)
            return (1 - b) * z + b * self.f(y, x)
        return last_pair(self.f, x, self.count, 1e-7 if how == "until close" else 0.0)[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("how", ["saves", "sets up", "is given"])
def test_a_backward_that_goes_back_finds_the_users_own_states(how: str) -> None:
    """A fixed point in their place gave gradients 18 to 500 times too large. Equal to the user's own run, to the last bit."""
    model, x = Model(how).double(), torch.randn(B, D, dtype=torch.float64)
    run, report = compiled(model, fullgraph=False)
    with record_solves() as solves:
        for _ in range(2):
            found = value_and_grads(run, model, x)
    assert not solves
    assert [s.reason for s in report.skipped if s.reason is not Reason.AUTOGRAD_FUNCTION][:1] == [Reason.STATES_KEPT], str(report)
    assert largest_error(found, value_and_grads(model, model, x)) == 0.0
    assert largest_error(found, reference(Model("loop"), x)) < 1e-6


def test_coupled_states_that_an_attached_step_reads_are_solved() -> None:
    """What has to stay out: a region of two states, found without gradients, and an implicit or Jacobian-free one behind it."""
    model, x = Model("attached", 40), torch.randn(B, D)
    run, report = compiled(model, fullgraph=False)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert [s.status for s in solves] == ["solve"], str(report)
    assert largest_error(found, reference(model, x)) < 1e-4


@pytest.mark.parametrize("how", ["loop", "until close"])
def test_a_loop_of_two_coupled_states_is_a_region(how: str) -> None:
    """It converges, and is solved; the gradient is the implicit one, within its tolerance."""
    model, x = Model(how, 60), torch.randn(B, D)
    run, report = compiled(model)
    with record_solves() as solves:
        for _ in range(2):
            found = value_and_grads(run, model, x)
    assert [s.status for s in solves] == ["solve", "solve"], str(report)
    assert largest_error(found, reference(model, x)) < 1e-4


def test_where_it_has_not_converged_its_own_gradient_stays() -> None:
    model, x = Model("loop", 6, gain=0.99), torch.randn(B, D)
    run, report = compiled(model)
    found = value_and_grads(run, model, x)
    assert report.regions[0].status.startswith("kept"), str(report)
    assert largest_error(found, reference(model, x)) < 1e-5


def test_its_own_gradient_in_bounded_memory() -> None:
    """`backward="unroll"` with `loop_memory`: what the paper's reversal is for, whatever the loop."""
    model, x = Model("loop", 60), torch.randn(B, D)
    run, report = compiled(model, backward="unroll", backward_tol=None, loop_memory=5)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert solves[0].adjoint_message == "the loop's own gradient", str(report)
    assert largest_error(found, reference(model, x)) < 1e-5
