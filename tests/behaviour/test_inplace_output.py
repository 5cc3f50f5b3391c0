"""The result of a region belongs to the user: written to in place, in whole or through a view, its gradient is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import fixed_point
from tests.helpers import compiled, largest_error

Change = Callable[[Tensor], Tensor]


def zeroed(z: Tensor) -> Tensor:
    z[:, 0] = 0
    return z


def scaled_view(z: Tensor) -> Tensor:
    z[:, :1].mul_(3)
    return z


def activated(z: Tensor) -> Tensor:
    return z.exp_()


class Cell(nn.Module):
    """f(z) + x under `how` the iterations are written; `count` 3 is no fixed point: that loop is kept."""

    def __init__(self, how: str, change: Change | None = None) -> None:
        super().__init__()
        self.how, self.change = how, change
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.3, 16).reshape(4, 4))
        self.conv = nn.Conv2d(4, 4, 1, bias=False)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        mixed = 0.4 * self.conv(z) if self.how == "image" else torch.tanh(z) @ self.weight
        return mixed + x  # linear at the end: an eager loop saves nothing of its result

    def iterate(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        if self.how == "fixed_point":
            return fixed_point(lambda z: self.f(z, x), z, tol=1e-8, backward_tol=1e-7)
        if self.how == "pair":
            a = b = z
            for _ in range(60):
                a, b = self.f(b, x), self.f(a, 0.5 * x)
            return a + 0 * b
        if self.how == "until":
            for _ in range(200):
                new = self.f(z, x)
                if (new - z).norm() < 1e-9:
                    break
                z = new
            return z
        for _ in range(7 if self.how == "kept" else 60):
            z = self.f(z, x)
        return z

    def forward(self, x: Tensor) -> Tensor:
        z = self.iterate(x)
        return z if self.change is None else self.change(z)


def gradients(run: Callable[[Tensor], Tensor], model: Cell, x: Tensor, change: Change | None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    if change is not None:
        change(out)
    wanted = [x, model.conv.weight if model.how == "image" else model.weight]
    return [out.detach().clone(), *torch.autograd.grad(out.square().sum(), wanted)]


def case(how: str) -> Tensor:
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    if how == "image":
        return x[:, :, None, None].expand(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    return x


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["loop", "pair", "image", "until", "kept"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_result_is_changed_in_place(how: str, inner: str, inside: bool) -> None:
    change = {"loop": scaled_view, "pair": activated, "image": zeroed, "until": zeroed, "kept": scaled_view}[how]
    x = case(how)
    model = Cell(how, change if inside else None).double()
    options: dict[str, Any] = {"inner": inner, "tol": 1e-9, "backward_tol": 1e-8, "verify_tol": 1e-6, "max_iter": 100}
    run, report = compiled(model, **options)
    expected = gradients(model, model, x, None if inside else change)
    for _ in range(2):  # the first call compares, the second does not
        assert largest_error(gradients(run, model, x, None if inside else change), expected) < 1e-5
    assert [region.status for region in report.regions] == ["kept" if how == "kept" else "solve"]


def test_the_linearisation_does_not_see_the_change() -> None:
    """The result is held by the user only: with a square in the body, what the products need is z itself."""
    weight = (torch.randn(4, 4, dtype=torch.float64) * 0.2).requires_grad_()

    def model(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = 0.3 * z * z @ weight + x
        return z

    run, report = compiled(model, inner="aot_eager", tol=1e-10, backward_tol=1e-9)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    c = torch.randn(2, 4, dtype=torch.float64)
    expected = torch.autograd.grad((model(x) * c).sum(), (weight, x))
    out = run(x)
    loss = (out * c).sum()
    with torch.no_grad():
        out.data.fill_(1e3)  # not even a version counter tells
    assert largest_error(list(torch.autograd.grad(loss, (weight, x))), list(expected)) < 1e-6
    assert len(report.regions) == 1


@pytest.mark.parametrize("change", [zeroed, scaled_view, activated])
def test_a_result_of_fixed_point_is_changed_in_place(change: Change) -> None:
    model, x = Cell("fixed_point").double(), case("loop")
    loop = Cell("loop").double()
    expected = gradients(loop, loop, x, change)
    assert largest_error(gradients(model, model, x, change), expected) < 1e-5
    run, report = compiled(model, tol=None, backward_tol=None)
    assert largest_error(gradients(run, model, x, change), expected) < 1e-5
    assert len(report.regions) == 1


def test_a_result_without_gradients_may_enter_a_graph_in_place() -> None:
    model, x, w = Cell("loop").double(), case("loop"), torch.ones(4, dtype=torch.float64, requires_grad=True)
    run, _ = compiled(model)
    with torch.no_grad():
        out = run(x)
    out.mul_(w)
    (grad,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(grad, model(x).detach().sum(0), rtol=1e-5, atol=1e-6)
