"""Shards gathered as operands: where each rank's part lies, what the operators promise torch, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deq_compile import fixed_point
from deq_compile.region import shards
from deq_compile.region.shards import Recipe


def recipe(rank: int, ranks: int, shapes: Any = ((7, 3), (7,)), dims: Any = (0, 0), **more: Any) -> Recipe:
    facts = {"dtype": torch.float32, "whole": torch.float32, "reduce": None, "divisor": 1.0, "groups": ()}
    return Recipe(shapes=shapes, dims=dims, rank=rank, ranks=ranks, **{**facts, **more})


@pytest.mark.parametrize(("ranks", "dim"), list(itertools.product((1, 2, 3, 4, 9), (0, 1))))
def test_parts_are_those_of_chunk(ranks: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all ranks send makes the whole parameter again, and of a gradient each gets the part that its shard has."""
    whole = torch.arange(21.0).reshape(7, 3)
    cut = [*whole.chunk(ranks, dim), *[whole.narrow(dim, 0, 0)] * ranks][:ranks]
    recipes = [recipe(rank, ranks, ((7, 3),), (dim,)) for rank in range(ranks)]
    names = [shards.register(one, None, None) for one in recipes]
    assert [one.shard_shape(0) for one in recipes] == [tuple(part.shape) for part in cut]

    sent: list[Tensor] = []
    monkeypatch.setattr(shards, "_collective", lambda *_: lambda every, own, group: sent.append(own))
    for name, part in zip(names, cut, strict=True):
        shards.gather_op([part], name)
    every = torch.cat(sent)
    monkeypatch.setattr(shards, "_collective", lambda *_: lambda out, own, group: out.copy_(every))
    torch.testing.assert_close(shards.gather_op([cut[0]], names[0])[0], whole, rtol=0, atol=0)

    for rank, name in enumerate(names):
        share = every.view(ranks, -1)[rank]
        monkeypatch.setattr(shards, "_collective", lambda *_: lambda own, sent, op, group: own.copy_(share))  # noqa: B023
        (found,) = torch.ops.deq.scatter.default([whole], [0], name)
        torch.testing.assert_close(found, cut[rank], rtol=0, atol=0)


def test_sums_in_a_small_range_are_divided_before_and_after() -> None:
    assert shards._divisors(8.0, torch.bfloat16) == (1.0, 8.0)
    before, after = shards._divisors(8.0, torch.float16)
    assert (before, before * after) == (4.0, 8.0)


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck, on torch 2.14
def test_operators(group: Any) -> None:
    name = shards.register(recipe(0, 1, whole=torch.bfloat16, reduce=torch.float32, divisor=2.0), group, None)
    own = [torch.randn(7, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    torch.library.opcheck(shards.gather_op, (own, name))
    grads = [torch.randn(7, 3, dtype=torch.bfloat16), torch.randn(7, dtype=torch.bfloat16)]
    torch.library.opcheck(torch.ops.deq.scatter.default, (grads, [0, 1], name))
    weight, _ = shards.gather_op(own, name)
    assert weight.dtype == torch.bfloat16
    (weight * grads[0]).sum().backward()
    assert own[0].grad is not None
    torch.testing.assert_close(own[0].grad, grads[0].float() / 2)
    assert own[1].grad is None  # nothing was made of it
    (twice,) = torch.autograd.grad((shards.gather_op(own, name)[0] ** 2).sum(), own[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        twice.sum().backward()


def test_a_recipe_of_another_process() -> None:
    with pytest.raises(RuntimeError, match=r"expected a recipe that this process has made.*Fix: compile the model here"):
        shards.gather_op([torch.ones(1)], "none")


class Cell(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(0.5 * super().forward(z))


def test_a_function_that_calls_a_sharded_module(group: Any) -> None:
    """In eager mode: its parameters, hooks and gradients are as they were and should be."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    plain, z0 = Cell(4, 4), torch.zeros(2, 4)
    sharded = Cell(4, 4)
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))
    before = [id(p) for p in sharded.parameters()]
    hooks = [list(sharded._forward_pre_hooks), list(sharded._forward_hooks)]
    for cell in (plain, sharded):
        fixed_point(cell, z0, backward="exact").sum().backward()
    assert [id(p) for p in sharded.parameters()] == before
    assert [list(sharded._forward_pre_hooks), list(sharded._forward_hooks)] == hooks
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)


def test_a_module_that_only_fsdp_can_gather(group: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    cell = Cell(4, 4)
    fully_shard(cell, mesh=dist.init_device_mesh("cpu", (1,)))
    cell.set_all_reduce_hook(lambda gradient: None)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"shards, and it has an all-reduce hook.*Fix: fully_shard the module that calls"):
        fixed_point(cell, torch.zeros(2, 4))
