"""`fixed_point` inside of torch.func transforms, in any order and depth, against a long loop in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from deq_compile import fixed_point, record_solves
from deq_compile.region.surroundings import NotHere

# forward-mode transforms compile decompositions with TorchScript at their first use
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
with torch.random.fork_rng():
    torch.manual_seed(0)
    W = (torch.randn(4, 4, dtype=torch.float64) * 0.2).requires_grad_()
    X = torch.randn(3, 4, dtype=torch.float64)
    CELL = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    nn.init.orthogonal_(CELL[0].weight, gain=0.2)
TIGHT = {"tol": 1e-11, "backward_tol": 1e-11, "max_iter": 100}
Solve = Callable[..., Tensor]
Case = Callable[[Solve], Any]


def f(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w + torch.sin(x)) + 0.1 * x * z


def solved(x: Tensor, w: Tensor = W, **options: Any) -> Tensor:
    return fixed_point(lambda z: f(z, x, w), torch.zeros_like(x), **(TIGHT | options))


def looped(x: Tensor, w: Tensor = W, **_: Any) -> Tensor:
    z = torch.zeros_like(x)
    for _step in range(200):
        z = f(z, x, w)
    return z


def square(solve: Solve) -> Callable[..., Tensor]:
    return lambda x, w=W: solve(x, w).square().sum()


def by_autograd(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Autograd around transforms: by the input, and by a parameter that none of them names."""
    x = X.clone().requires_grad_()
    return torch.autograd.grad(function(x).square().sum(), [x, W])


CASES: dict[str, Case] = {
    "grad": lambda s: grad(square(s))(X),
    "vmap": lambda s: vmap(s)(X),
    "vmap along the last dimension": lambda s: vmap(s, in_dims=1, out_dims=1)(X.T),
    "vmap in vmap": lambda s: vmap(vmap(s))(X[None].expand(2, 3, 4)),
    "vmap in chunks": lambda s: vmap(s, chunk_size=2)(X),
    "jacrev": lambda s: jacrev(s)(X),
    "jacfwd": lambda s: jacfwd(s)(X),
    "vjp": lambda s: vjp(s, X)[1](X),
    "jvp": lambda s: jvp(s, (X,), (X.cos(),)),
    "gradients of samples": lambda s: vmap(grad(square(s)))(X),
    "gradients of samples by the weight": lambda s: vmap(grad(square(s), argnums=1), in_dims=(0, None))(X, W),
    "gradient of a batch": lambda s: grad(lambda w: vmap(lambda x: s(x, w))(X).square().sum())(W),
    "hessian": lambda s: hessian(square(s))(X[0]),
    "hessian by reverse mode": lambda s: jacrev(jacrev(square(s)))(X[0]),
    "hessian by forward mode": lambda s: jacfwd(jacfwd(square(s)))(X[0]),
    "hessian by the weight": lambda s: hessian(square(s), argnums=1)(X[0], W),
    "laplacians": lambda s: vmap(lambda x: hessian(square(s))(x).trace())(X),
    "third derivative": lambda s: grad(lambda u: grad(lambda x: grad(square(s))(x).square().sum())(u).square().sum())(X),
    "autograd around vmap": lambda s: by_autograd(vmap(s)),
    "autograd around grad": lambda s: by_autograd(grad(square(s))),
    "autograd around hessians": lambda s: by_autograd(vmap(hessian(square(s)))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives(name: str) -> None:
    torch.testing.assert_close(CASES[name](solved), CASES[name](looped), rtol=1e-6, atol=1e-8)


def test_the_samples_of_vmap_are_rows_of_one_solve() -> None:
    with record_solves(tensors=True) as records:
        vmap(solved)(X)
    assert [record.z.shape for record in records if record.z is not None] == [(3, 4)]


def test_what_the_solve_came_to() -> None:
    def solve(x: Tensor) -> tuple[Tensor, Any]:
        return fixed_point(lambda z: f(z, x, W), torch.zeros_like(x), return_info=True, **TIGHT)

    _, alone = solve(X)
    _, mapped = vmap(lambda x: solve(x[None]))(X)
    assert alone.converged.all()
    assert mapped.converged.shape == (3, 1)
    assert mapped.converged.all()
    assert (mapped.residual < 1e-10).all()


def test_modules_by_functional_call() -> None:
    """Per-sample gradients of a layer's parameters, as in the recipe of torch.func."""
    parameters = dict(CELL.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, solve: bool) -> Tensor:
        step = lambda z: 0.5 * functional_call(CELL, parameters, z) + x  # noqa: E731
        if solve:
            return fixed_point(step, torch.zeros_like(x), **TIGHT).square().sum()
        z = torch.zeros_like(x)
        for _ in range(200):
            z = step(z)
        return z.square().sum()

    found, right = (vmap(grad(lambda p, x: loss(p, x, s)), in_dims=(None, 0))(parameters, X) for s in (True, False))  # noqa: B023
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-8)


def test_several_states_and_what_needs_no_gradient() -> None:
    index = torch.tensor([3, 1, 0, 2])

    def solve(x: Tensor, long: bool) -> Tensor:
        step = lambda s: (torch.tanh(s[1][..., index] @ W + x), 0.3 * s[0].sin() + x)  # noqa: E731
        start = (torch.zeros_like(x), torch.ones_like(x))
        if long:
            for _ in range(200):
                start = step(start)
        return sum(start if long else fixed_point(step, start, **TIGHT))  # type: ignore[return-value]

    found, right = (vmap(jacrev(lambda x: solve(x, long)))(X) for long in (False, True))  # noqa: B023
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-8)


def test_a_start_that_f_reads_too() -> None:
    """The gradient is that of what f reads; the start has none."""
    found = grad(lambda x: fixed_point(lambda z: f(z, x, W), x, **TIGHT).square().sum())(X)
    torch.testing.assert_close(found, grad(square(looped))(X), rtol=1e-6, atol=1e-8)


def test_it_honours_the_tolerance() -> None:
    """Loose tolerances leave errors of their size."""
    error = (vmap(lambda x: solved(x, tol=1e-3))(X) - looped(X)).norm() / looped(X).norm()
    assert 1e-9 < error < 1e-2


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def changing(x: Tensor) -> Tensor:
    calls: list[int] = []

    def step(z: Tensor) -> Tensor:
        calls.append(0)
        return 0.3 * torch.sin(z) + (x if len(calls) == 1 else W[0])

    return fixed_point(step, torch.zeros_like(x))


@pytest.mark.parametrize("transform", [vmap, lambda s: grad(lambda x: s(x).sum())])
def test_what_it_cannot_see_it_refuses(transform: Any) -> None:
    """Another tensor at a later call: its gradient would be lost in silence."""
    with pytest.raises(NotHere, match=r"reads a tensor that it did not read when it was called first.*Fix: "):
        transform(changing)(X)


@pytest.mark.parametrize("transform", [vmap, lambda s: grad(lambda x: s(x).sum())])
def test_an_autograd_function_in_f(transform: Any) -> None:
    """Right, or refused; never another number."""
    step = lambda s: transform(s)(X)  # noqa: E731
    try:
        found = step(lambda x: fixed_point(lambda z: torch.tanh(0.1 * Doubled.apply(z) + x), torch.zeros_like(x), **TIGHT))
    except NotHere:
        return
    right = step(lambda x: fixed_point(lambda z: torch.tanh(0.2 * z + x), torch.zeros_like(x), **TIGHT))
    torch.testing.assert_close(found, right)


def test_functionalize_is_refused() -> None:
    with pytest.raises(NotHere, match=r"inside of torch\.func\.functionalize.*Fix: "):
        functionalize(solved)(X)


def test_f_that_changes_its_state() -> None:
    with pytest.raises(ValueError, match=r"expected f to keep shape, dtype and device.*got \(\)"):
        vmap(lambda x: fixed_point(lambda z: (z + x).sum(), torch.zeros_like(x)))(X)
