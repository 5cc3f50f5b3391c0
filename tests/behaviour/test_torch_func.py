"""Tensors that are not plain: torch.func's, DTensor, nested, sparse. Loops on them are left alone, loops beside them not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import Reason, explain
from tests.helpers import compiled

with torch.random.fork_rng():
    torch.manual_seed(0)
    W = (torch.randn(4, 4) * 0.2).requires_grad_()
    X = torch.randn(3, 4)
    LAYER = nn.Linear(4, 4)


def loop(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = torch.tanh(z @ W + x)
    return z


def until(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(60):
        new = torch.tanh(z @ W + x)
        if (new - z).norm() < 1e-5:
            return new
        z = new
    return z


def vmapped_body(x: Tensor) -> Tensor:
    f = torch.func.vmap(lambda row: torch.tanh(row @ W))
    z = torch.zeros_like(x)
    for _ in range(30):
        z = f(z) + x
    return z


def loop_of_a_closure(x: Tensor) -> Tensor:
    """The loop's tensors are plain; the transform around it is open."""
    return torch.func.vmap(lambda row: row + loop(x).sum())(x)


TRANSFORMED: dict[str, Callable[[Tensor], Any]] = {
    "vmap": torch.func.vmap(loop),
    "grad": torch.func.grad(lambda x: loop(x).sum()),
    "jacrev": torch.func.jacrev(loop),
    "jacfwd": torch.func.jacfwd(loop),
    "jvp": lambda x: torch.func.jvp(loop, (x,), (torch.ones_like(x),))[1],
    "hessian": torch.func.hessian(lambda x: loop(x).sum()),
    "vmapped body": vmapped_body,
    "closure": loop_of_a_closure,
}


# forward-mode transforms compile decompositions with TorchScript at their first use
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transformed_loop_is_left_alone(name: str) -> None:
    function = TRANSFORMED[name]
    run, report = compiled(function)
    torch.testing.assert_close(run(X), function(X))
    assert not report.regions
    assert {skipped.reason for skipped in report.skipped} == {Reason.NOT_PLAIN}
    assert all(skipped.location.file == __file__ for skipped in report.skipped)


def test_a_transformed_loop_with_a_test_is_left_alone() -> None:
    function = torch.func.grad(lambda x: until(x).sum())
    run, report = compiled(function, fullgraph=False)
    torch.testing.assert_close(run(X), function(X))
    assert not report.regions


def mask_beside(x: Tensor) -> Tensor:
    return loop(x) * torch.vmap(lambda i: i >= 1)(torch.arange(4))


def jacobian_behind(x: Tensor) -> Tensor:
    return torch.func.jacrev(torch.tanh)(loop(x)).sum((2, 3))


def called_functionally(x: Tensor) -> Tensor:
    return torch.func.functional_call(LAYER, {"weight": W, "bias": x[0]}, (until(x),))


@pytest.mark.parametrize("function", [mask_beside, jacobian_behind, called_functionally])
def test_a_loop_beside_a_transform_is_solved(function: Callable[[Tensor], Tensor]) -> None:
    run, report = compiled(function)
    x = X.clone().requires_grad_()
    found, expected = run(x), function(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (grad,), (right,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, right, rtol=1e-3, atol=1e-4)
    assert len(report.regions) == 1


def test_a_block_mask_of_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def model(x: Tensor) -> Tensor:
        mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
        return loop(x) * mask.kv_num_blocks.sum()

    run, report = compiled(model, fullgraph=False)
    torch.testing.assert_close(run(X), model(X), rtol=1e-4, atol=1e-5)
    assert len(report.regions) == 1


def test_a_nested_tensor_is_left_alone() -> None:
    def model(x: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor([x[:2], x], layout=torch.jagged)
        z = torch.zeros_like(nested)
        for _ in range(30):
            z = torch.tanh(0.3 * z + nested)
        return z.values()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = model(X)
        report = explain(model, inner="eager")(X)
        torch.testing.assert_close(compiled(model, fullgraph=False)[0](X), right)
    assert [skipped.reason for skipped in report.skipped] == [Reason.NOT_PLAIN]


@pytest.fixture
def one_rank() -> Iterator[Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_distributed_parameters_are_left_alone(one_rank: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    weight = nn.Parameter(distribute_tensor(W.detach(), one_rank))

    def model(x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(30):
            state = torch.tanh(state @ weight + x)
        return state

    run, report = compiled(model)
    x = distribute_tensor(X, one_rank)
    torch.testing.assert_close(run(x).to_local(), model(x).to_local())
    assert not report.regions
    assert Reason.NOT_PLAIN in {skipped.reason for skipped in report.skipped}
