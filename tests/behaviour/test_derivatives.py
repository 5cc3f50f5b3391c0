"""Derivatives other than one backward: second ones raise, batched ones are right, forward-mode ones are right or raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp, jacobian, vhp
from torch.utils.flop_counter import FlopCounterMode

from deq_compile import RegionWarning, fixed_point, record_solves
from tests.helpers import compiled

with torch.random.fork_rng():
    torch.manual_seed(0)
    W = (torch.randn(4, 4, dtype=torch.float64) * 0.2).requires_grad_()
    X = torch.randn(2, 4, dtype=torch.float64)


def loop(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(60):
        z = torch.tanh(z @ W + torch.sin(x))
    return z


def declared(x: Tensor, **options: Any) -> Tensor:
    e = torch.sin(x)
    return fixed_point(lambda z: torch.tanh(z @ W + e), torch.zeros_like(x), **{"tol": 1e-9, "backward_tol": 1e-8, **options})


def region(x: Tensor) -> Tensor:
    out: Tensor = compiled(loop, tol=1e-9, backward_tol=1e-8)[0](x)
    return out


def kept(x: Tensor) -> Tensor:
    def short(x: Tensor) -> Tensor:
        z = x
        for _ in range(7):
            z = torch.tanh(z @ W + torch.sin(x))
        return z

    out: Tensor = compiled(short)[0](x)
    return out


Model = Callable[[Tensor], Tensor]


def by_grad(f: Model) -> None:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    torch.autograd.grad(g[:, 0].sum(), x)


def by_grad_of_a_parameter(f: Model) -> None:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), W)


def of_a_parameter_by_the_input(f: Model) -> None:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), W, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)


def by_backward(f: Model) -> None:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    g.square().sum().backward(inputs=[x])


def of_a_cotangent(f: Model) -> None:
    """The trick by which a product J v is made of two backwards."""
    x, v = X.clone().requires_grad_(), torch.ones_like(X).requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, v, create_graph=True)
    torch.autograd.grad(g, v, torch.ones_like(g))


SECOND: dict[str, Callable[[Model], Any]] = {
    "grad": by_grad,
    "grad of a parameter": by_grad_of_a_parameter,
    "grad of a parameter by the input": of_a_parameter_by_the_input,
    "backward(inputs=)": by_backward,
    "cotangent": of_a_cotangent,
    "hessian": lambda f: hessian(lambda x: f(x).sum(), X),
    "vectorised hessian": lambda f: hessian(lambda x: f(x).sum(), X, vectorize=True),
    "hvp": lambda f: hvp(lambda x: f(x).sum(), X, X),
    "vhp": lambda f: vhp(lambda x: f(x).sum(), X, X),
}


# Dynamo looks at `.grad` of the input that `hessian` makes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("model", [declared, region, kept])
@pytest.mark.parametrize("way", SECOND)
def test_a_second_derivative_raises(way: str, model: Model) -> None:
    with pytest.raises(RuntimeError, match="double backward through a fixed-point region"):
        SECOND[way](model)


@pytest.mark.parametrize("model", [declared, region])
def test_create_graph_alone_is_no_second_derivative(model: Model) -> None:
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (right,) = torch.autograd.grad(loop(y).sum(), y)
    torch.testing.assert_close(g, right, rtol=1e-6, atol=1e-7)
    scale = torch.ones((), dtype=X.dtype, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad((g.detach() * scale).sum(), scale)[0], right.sum(), rtol=1e-6, atol=1e-7)


def rows(f: Model, x: Tensor, how: str) -> Tensor:
    x = x.clone().requires_grad_()
    y, basis = f(x), torch.eye(8, dtype=X.dtype).view(8, 2, 4)
    if how == "is_grads_batched":
        (found,) = torch.autograd.grad(y, x, basis, is_grads_batched=True)
    else:
        found = torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(basis)
    return found.view(2, 4, 2, 4)


@pytest.mark.parametrize("how", ["jacobian", "is_grads_batched", "vmap"])
@pytest.mark.parametrize("model", [declared, region, "aot_eager"])
def test_batched_gradients(model: Any, how: str) -> None:
    if model == "aot_eager":
        if how == "vmap":
            pytest.skip("torch refuses it for every compiled backward")
        model, _ = compiled(loop, tol=1e-9, backward_tol=1e-8, inner="aot_eager")
    found = jacobian(model, X, vectorize=True) if how == "jacobian" else rows(model, X, how)
    torch.testing.assert_close(found, jacobian(loop, X), rtol=1e-6, atol=1e-7)


def test_batched_gradients_of_two_states() -> None:
    """One state gets no cotangent at all."""

    def pair(x: Tensor) -> Tensor:
        start = (torch.zeros_like(x), torch.zeros_like(x))
        a, _ = fixed_point(lambda s: (torch.tanh(s[1] @ W), 0.5 * torch.sin(s[0]) + x), start, tol=1e-9, backward_tol=1e-8)
        return a

    def pair_loop(x: Tensor) -> Tensor:
        a = b = torch.zeros_like(x)
        for _ in range(60):
            a, b = torch.tanh(b @ W), 0.5 * torch.sin(a) + x
        return a

    torch.testing.assert_close(jacobian(pair, X, vectorize=True), jacobian(pair_loop, X), rtol=1e-6, atol=1e-7)


def tangent(f: Model, grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        found: Tensor = forward_ad.unpack_dual(f(forward_ad.make_dual(X, torch.cos(X)))).tangent
        return found


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(grad: bool) -> None:
    """That of a declared fixed point is a fixed point as well; a region of fixed count sends tangents through its loop."""
    torch.testing.assert_close(tangent(declared, grad), tangent(loop, grad), rtol=1e-6, atol=1e-7)
    assert tangent(lambda x: fixed_point(lambda z: 0.5 * z + 1, 0 * x.detach()), grad) is None
    run, _ = compiled(loop, fullgraph=False)  # torch 2.14 compiles nothing that carries tangents
    run(X)
    torch.testing.assert_close(tangent(run, grad), tangent(loop, grad))
    with forward_ad.dual_level():  # nothing carries a tangent
        torch.testing.assert_close(declared(X), loop(X), rtol=1e-6, atol=1e-7)


def test_nobody_differentiates_a_tangent_in_silence() -> None:
    x = X.clone().requires_grad_()
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(declared(forward_ad.make_dual(x, torch.cos(X))))
        torch.testing.assert_close(torch.autograd.grad(y.primal.sum(), x)[0], torch.autograd.grad(loop(x).sum(), x)[0])
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(y.tangent.sum(), x)


def test_a_tangent_that_is_not_reached_is_said() -> None:
    with pytest.warns(RegionWarning, match="its tangent missed backward_tol"):
        tangent(lambda x: declared(x, backward_max_iter=1, max_iter=3, tol=0.5), grad=False)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_through_a_test_of_the_users_is_refused() -> None:
    def until(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        while True:
            new = torch.tanh(z @ W + x)
            if (new - z).norm() < 1e-9:
                return new
            z = new

    run, report = compiled(until)
    run(X)
    assert len(report.regions) == 1
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative|forward-mode AD tangent"):
        tangent(run, True)


@pytest.mark.parametrize("inside", [True, False])
def test_counting_flops_around_fixed_point(inside: bool) -> None:
    """The counter hooks into modules and their inputs; the body's products are counted, and the gradient is right."""
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)

    def model(x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x), tol=1e-9, backward_tol=1e-8)

    outer = torch.nn.Module()
    outer.forward = model
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        (outer if inside else model)(x).sum().backward()
    product = 2 * X.numel() * 4
    assert counter.get_total_flops() >= 10 * product
    model(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def vjps(**options: Any) -> list[int | None]:
    """Products of three backwards of one call in the source."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))[0] * 0.9
    found = []
    for _ in range(3):
        with record_solves() as solves:
            z = fixed_point(lambda z: torch.tanh(z @ q) + x, torch.zeros(16, 32), tol=1e-6, backward_tol=1e-5, **options)
            z.sum().backward()
        found.append(solves[0].vjps)
        assert solves[0].adjoint_residual_batch is not None
        held = {"never": False, "always": True}.get(options["reuse"], bool(solves[0].reused))  # what nobody uses is not held
        assert (solves[0].bytes > 0) == held or not found[:-1]
    return found


def test_fixed_point_honours_reuse() -> None:
    never, always, auto = vjps(reuse="never"), vjps(reuse="always"), vjps(reuse="auto")
    assert max(always) < min(never)  # type: ignore[type-var]
    assert auto in (always, [*always[:1], *never[:2]], never)  # decided at the first call, by counting


def test_fixed_point_records_the_jacobian_free_gradient() -> None:
    x = X.clone().requires_grad_()
    with record_solves(tensors=True) as solves:
        declared(x, backward="jfb").sum().backward()
    (record,) = solves
    assert record.vjps == 1
    assert record.w is not None
    torch.testing.assert_close(record.w, torch.ones_like(X))
    assert record.adjoint_residual is not None
    assert record.adjoint_residual > 0.01
    plain = X.clone().requires_grad_()
    declared(plain, backward="jfb").sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=0, atol=0)
