"""`fixed_point(…, derivatives=n)`: Hessians, gradient penalties, third derivatives, against a long loop in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, hvp, jacobian, vhp
from torch.utils.checkpoint import checkpoint

from deq_compile import explain, fixed_point
from deq_compile.testing import Backend

with torch.random.fork_rng():
    torch.manual_seed(0)
    W = (torch.randn(4, 4, dtype=torch.float64) * 0.2).requires_grad_()
    X = torch.randn(2, 4, dtype=torch.float64)
    V = torch.randn(2, 4, dtype=torch.float64)
TIGHT = {"tol": 1e-11, "backward_tol": 1e-11, "max_iter": 100}


def solved(x: Tensor, derivatives: int = 2, w: Tensor = W) -> Tensor:
    """Reads a parameter, the input, and something made of the input outside of f."""
    e = torch.sin(x)
    f = lambda z: torch.tanh(z @ w + e) + 0.1 * x * z  # noqa: E731
    return fixed_point(f, torch.zeros_like(x), derivatives=derivatives, **TIGHT)


def looped(x: Tensor, w: Tensor = W) -> Tensor:
    z, e = torch.zeros_like(x), torch.sin(x)
    for _ in range(300):
        z = torch.tanh(z @ w + e) + 0.1 * x * z
    return z


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def penalty(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """A loss of value and gradient together, by everything."""
    x = X.clone().requires_grad_()
    y = f(x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum() + y.sum(), [x, W])


def mixed(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    x = X.clone().requires_grad_()
    g = torch.autograd.grad(f(x).sum(), [W, x], create_graph=True)
    return torch.autograd.grad((g[0] ** 3).sum() + (g[1] * V).sum(), [x, W])


def forwards_by_two_backwards(f: Callable[[Tensor], Tensor]) -> Tensor:
    """J v, the second backward by a cotangent that is zero."""
    x, u = X.clone().requires_grad_(), torch.zeros_like(X, requires_grad=True)
    (g,) = torch.autograd.grad(f(x), x, u, create_graph=True)
    return torch.autograd.grad(g, u, V)[0]


def by_backward(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """`.backward()` into leaves, where the first derivative stays beside the second."""
    x, w = X.clone().requires_grad_(), W.detach().clone().requires_grad_()
    y = f(x, w=w)  # type: ignore[call-arg]
    y.sum().backward(create_graph=True)
    assert x.grad is not None
    assert w.grad is not None
    first = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    (first[0].square().sum() + first[1].square().sum()).backward()
    return first[0].detach(), first[1].detach(), x.grad, w.grad  # type: ignore[return-value]


def twice_in_turn(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Backward upon backward through one value, with and without a record of it."""
    x = X.clone().requires_grad_()
    y = f(x)
    (plain,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (both,) = torch.autograd.grad(g.sum() + y.sum(), x)
    return plain, second, again, both


def two_recorded(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Several gradients of one value in one loss, beside the value; then one more, when a second derivative has been taken."""
    x = X.clone().requires_grad_()
    y = f(x)
    a = torch.autograd.grad(y, [x, W], V, create_graph=True)
    b = torch.autograd.grad(y, [x, W], V.square(), create_graph=True)
    loss = a[0].square().sum() + (a[1] * b[1]).sum() + b[0].sum()
    first = torch.autograd.grad(loss + y.square().sum(), [x, W], retain_graph=True)
    c = torch.autograd.grad(y.square().sum(), [x, W], create_graph=True)
    return *first, *torch.autograd.grad(loss + c[0].square().sum() + c[1].sum(), [x, W])


def forwards_again(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Two J v by two backwards each, whose cotangents are zero."""
    x, u = X.clone().requires_grad_(), torch.zeros_like(X, requires_grad=True)
    y = f(x)
    first, second = (torch.autograd.grad(y, x, u, create_graph=True)[0] for _ in range(2))
    return torch.autograd.grad(first, u, V, retain_graph=True)[0], torch.autograd.grad(second, u, V)[0]


SECOND = [penalty, mixed, forwards_by_two_backwards, by_backward, twice_in_turn, two_recorded, forwards_again]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph:UserWarning")
@pytest.mark.parametrize("how", SECOND)
def test_second_derivatives(how: Callable[..., Any]) -> None:
    close(how(solved), how(looped))


def test_functional() -> None:
    f, g = (lambda x: solved(x).square().sum()), (lambda x: looped(x).square().sum())
    close(hessian(f, X), hessian(g, X))
    close(vhp(f, X, V), vhp(g, X, V))
    close(hvp(lambda x: solved(x, 3).square().sum(), X, V), hvp(g, X, V))  # made of three backwards
    close(jacobian(lambda x: solved(x, 1), X), jacobian(looped, X))


def test_gradgradcheck() -> None:
    w, x = W.detach().clone().requires_grad_(), X.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: solved(x, w=w), (x, w))


def test_third_derivatives() -> None:
    def third(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * V).sum(), x, create_graph=True)
        return torch.autograd.grad(h.square().sum(), [x, W])

    close(third(lambda x: solved(x, 3)), third(looped))


def test_several_recorded_of_three() -> None:
    close(two_recorded(lambda x: solved(x, 3)), two_recorded(looped))


def test_one_more_than_asked_for_raises() -> None:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(solved(x).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Fix: derivatives=3 in the call of fixed_point"):
        torch.autograd.grad(h.sum(), x)


@pytest.mark.parametrize("which", [0, 1])
def test_one_more_raises_after_several_that_were_recorded(which: int) -> None:
    x = X.clone().requires_grad_()
    y = solved(x)
    g = [torch.autograd.grad(y, x, v, create_graph=True)[0] for v in (V, V.square())][which]
    for loss in (g.square().sum(), (g - g.detach()).square().sum(), g.sum() + y.sum()):  # in the second what comes is zero
        (h,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="Fix: derivatives=3 in the call of fixed_point"):
            torch.autograd.grad(h.sum(), x, retain_graph=True)


class Energy(nn.Module):
    """Forces are gradients of an energy that reads a fixed point, and stand in the loss: a force field."""

    def __init__(self, again: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.W, self.U, self.head, self.again = nn.Linear(6, 6), nn.Linear(3, 6), nn.Linear(6, 1), again
        nn.init.orthogonal_(self.W.weight, gain=0.5)
        self.double()

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        u, z = self.U(positions), torch.zeros(len(positions), 6, dtype=torch.float64)
        if self.again:
            z = fixed_point(lambda z: torch.tanh(self.W(z) + u), z, derivatives=self.again, **TIGHT)
        else:
            for _ in range(200):
                z = torch.tanh(self.W(z) + u)
        energy = self.head(z).sum()
        return energy, -torch.autograd.grad(energy, positions, create_graph=True)[0]


def test_forces_in_a_loss() -> None:
    found = []
    for again in (2, 0):
        model, positions = Energy(again), torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3).requires_grad_()
        energy, forces = model(positions)
        (energy.square() + forces.square().sum()).backward()
        found.append([p.grad for p in model.parameters()])
    close(*found)


def test_states_of_two_parts_and_what_needs_no_gradient() -> None:
    def run(derivatives: int) -> tuple[Tensor, ...]:
        x = X.clone().requires_grad_()

        def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"a": torch.tanh(0.3 * state["b"] + x), "b": 0.5 * torch.cos(state["a"]) + 1}

        state = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
        if derivatives:
            state = fixed_point(f, state, derivatives=derivatives, **TIGHT)
        else:
            for _ in range(200):
                state = f(state)
        (g,) = torch.autograd.grad((state["a"] * state["b"]).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum() + state["b"].sum(), x)

    close(run(2), run(0))


def test_nothing_is_held_when_the_graph_is_gone() -> None:
    """Nodes and gates know of each other, through graphs that no collector looks into."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(4):
        penalty(solved)
        forwards_by_two_backwards(solved)
        counts.append(alive())
    assert counts[3] <= counts[1]  # what others have left may go meanwhile


def test_backwards_in_two_threads() -> None:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(solved(x).square().sum(), x, create_graph=True)
    want = torch.autograd.grad(g.sum(), x, retain_graph=True)[0]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: torch.autograd.grad(g.sum(), x, retain_graph=True)[0], range(8)))
    for one in found:
        close(one, want)


def small(z: Tensor, again: int) -> Tensor:
    """A fixed point of its own, inside of a body."""

    def f(u: Tensor) -> Tensor:
        return 0.3 * torch.sin(u) + 0.2 * z

    return repeated(f, z.detach(), again)


def repeated(f: Callable[[Tensor], Tensor], z: Tensor, again: int) -> Tensor:
    """The fixed point, declared where it is to be differentiated `again` times; by a loop where that is 0."""
    if again:
        return fixed_point(f, z, derivatives=again, **TIGHT)
    for _ in range(100):
        z = f(z)
    return z


BODIES: dict[str, Callable[[nn.Module, Tensor, int], Callable[[Tensor], Tensor]]] = {
    "plain": lambda lin, x, again: lambda z: torch.tanh(lin(z) + x),
    "checkpoint": lambda lin, x, again: (
        lambda z: checkpoint(lambda z, x: torch.tanh(lin(z) + x), z, x, use_reentrant=False)  # type: ignore[return-value]
    ),
    "nested": lambda lin, x, again: lambda z: torch.tanh(lin(small(z, again)) + x),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the loop's first state needs no gradient
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("hooked", [False, True])
def test_bodies_with_graphs_of_their_own(body: str, hooked: bool) -> None:
    lin = nn.Linear(4, 4).double()
    nn.init.orthogonal_(lin.weight, gain=0.4)
    seen: list[int] = []
    if hooked:
        lin.register_full_backward_hook(lambda *_: seen.append(1))
    found = []
    for again in (2, 0):
        x = X.clone().requires_grad_()
        z = repeated(BODIES[body](lin, x, again), torch.zeros_like(x), again)
        z = z.add_(1) if again else z + 1  # the user may write to a fixed point
        (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [x, lin.weight]))
    close(*found)
    assert bool(seen) == hooked


def test_what_is_no_implicit_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an implicit gradient for derivatives=2, got backward='jfb'"):
        fixed_point(lambda z: 0.5 * z, X.clone(), derivatives=2, backward="jfb")
    with pytest.raises(ValueError, match="derivatives to be an integer of at least 1, got 0"):
        fixed_point(lambda z: 0.5 * z, X.clone(), derivatives=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo, where a graph begins anew
def test_in_a_compiled_model_it_stays_outside_of_the_graph() -> None:
    """Torch refuses a second backward through a compiled graph; the first one is right."""
    run = torch.compile(lambda x: solved(x) + 1, backend=Backend({"inner": "eager"}))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    close(*(torch.autograd.grad(value.square().sum(), at) for value, at in ((run(x), x), (looped(y) + 1, y))))
    report = explain(lambda x: solved(x) + 1, inner="eager")(x)
    assert report.regions == []
    assert "fixed_point" in str(report)
