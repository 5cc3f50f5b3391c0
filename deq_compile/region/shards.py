"""Sharded parameters as operands: `deq::gather` makes whole tensors of the ranks' shards, its gradient is reduced and scattered.

    gather(Tensor[] shards, str recipe) -> Tensor[]                  one all-gather
    scatter(Tensor[] grads, int[] which, str recipe) -> Tensor[]     one reduce-scatter, and one all-reduce where groups of ranks
                                                                     hold the same shards (HSDP)

FSDP2 gathers the parameters of a module around each of its calls. A loop that calls it N times gathers N times, and a solve would
gather as often as its rank happens to evaluate: ranks that need different numbers of evaluations would wait for each other
forever. Here the shards are gathered once, before the solve, as an operand that the loop does not change, and the operand's
gradient is scattered once: each rank calls as many collectives as the others, whatever its solve needs. The whole parameters live
from the solve to its backward, as with `reshard_after_forward=False`.

What is to be done is a `Recipe`, known to both operators by a name that is made of its content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deq_compile.fsdp_parts import NotGathered, Policy, Sharded
from deq_compile.torch_parts import below_autograd

from .op import library, once

TAGS = tuple(tag for tag in (getattr(torch.Tag, "pt2_compliant_tag", None),) if tag is not None)
library.define("gather(Tensor[] shards, str recipe) -> Tensor[]", tags=TAGS)
library.define("scatter(Tensor[] grads, int[] which, str recipe) -> Tensor[]", tags=TAGS)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the parameters of one module lie on the ranks.

    shapes   of the whole parameters
    dims     along which each is cut, in `ranks` chunks as `torch.chunk` cuts; the last ones are smaller or empty
    rank, ranks  this one's number in the group of shards, and how many there are
    dtype    of the shards; `whole`: of what is gathered; `reduce`: of gradients on their way (None: as they come)
    divisor  of the sum of all ranks' gradients
    """

    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[int, ...]
    rank: int
    ranks: int
    dtype: torch.dtype
    whole: torch.dtype
    reduce: torch.dtype | None
    divisor: float
    groups: tuple[str, ...]  # names, of shards and of replicas: for the content's sake

    def name(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:24]

    def chunk(self, which: int) -> int:
        """How many indices of its dimension a rank has of a parameter, if not one of the last."""
        return -(-self.shapes[which][self.dims[which]] // self.ranks)

    def rest(self, which: int) -> tuple[int, ...]:
        """The other sizes of a parameter."""
        shape, dim = self.shapes[which], self.dims[which]
        return shape[:dim] + shape[dim + 1 :]

    def elements(self, which: int) -> int:
        """A rank's share of a parameter, padding included."""
        return self.chunk(which) * math.prod(self.rest(which))

    def shard_shape(self, which: int) -> tuple[int, ...]:
        """That of this rank's shard."""
        shape, dim, chunk = self.shapes[which], self.dims[which], self.chunk(which)
        own = min(chunk, max(0, shape[dim] - self.rank * chunk))
        return (*shape[:dim], own, *shape[dim + 1 :])


# By name, with the groups of shards and (or None) of replicas. What Dynamo traced in this process is here.
_recipes: dict[str, tuple[Recipe, Any, Any]] = {}


def register(recipe: Recipe, shards: Any, replicas: Any) -> str:
    """The name by which the operators know a recipe; the newest process groups of one content count."""
    name = recipe.name()
    _recipes[name] = recipe, shards, replicas
    return name


def find(name: str) -> tuple[Recipe, Any, Any]:
    """A recipe with its process groups.

    Raises:
        RuntimeError: it comes from another process.
    """
    if name not in _recipes:
        raise RuntimeError(
            f"deq::gather: expected a recipe that this process has made, got {name!r} of another one. Fix: compile the model here"
        )
    return _recipes[name]


def parts(parameters: Sequence[Sharded]) -> list[list[int]]:
    """The numbers of those parameters that are gathered together: of one dtype, mesh and placement, trained or not."""
    found: dict[Any, list[int]] = {}
    for number, known in enumerate(parameters):
        p = known.parameter
        kinds = tuple(type(placement) for placement in p.placements)
        found.setdefault((p.dtype, p.requires_grad, p.device_mesh, kinds), []).append(number)
    return list(found.values())


def recipe_of(parameters: Sequence[Sharded], policy: Policy) -> str:
    """The name of the recipe for parameters that lie alike.

    Raises:
        NotGathered: they are cut in a way that FSDP2 alone knows.
    """
    from torch.distributed.tensor import Replicate, Shard

    known, first = parameters[0], parameters[0].parameter
    kinds = [type(placement) for placement in first.placements]
    if kinds not in ([Shard], [Replicate, Shard]):
        raise NotGathered(f"its parameters lie as {tuple(first.placements)}, neither sharded nor sharded and replicated")
    axis = len(kinds) - 1
    groups = [group for group in (known.shards, known.replicas) if group is not None]
    recipe = Recipe(
        shapes=tuple(tuple(p.parameter.shape) for p in parameters),
        dims=tuple(p.parameter.placements[axis].dim % max(p.parameter.dim(), 1) for p in parameters),
        rank=known.shards.rank(),
        ranks=known.shards.size(),
        dtype=first.dtype,
        whole=policy.whole or first.dtype,
        reduce=policy.reduce,
        divisor=math.prod(group.size() for group in groups) if policy.divisor is None else policy.divisor,
        groups=tuple(group.group_name for group in groups),
    )
    return register(recipe, known.shards, known.replicas)


def _gather(shards: list[Tensor], name: str) -> list[Tensor]:
    recipe, group, _ = find(name)
    sizes = [recipe.elements(which) for which in range(len(shards))]
    own = shards[0].new_zeros(sum(sizes), dtype=recipe.whole)  # zeros: the padding is summed up by nobody, but should be no NaN
    for which, (shard, place) in enumerate(zip(shards, own.split(sizes), strict=True)):
        part = shard.detach().movedim(recipe.dims[which], 0).reshape(-1)
        place[: part.numel()].copy_(part)
    every = own.new_empty(recipe.ranks * own.numel())
    _collective("all_gather_single", "all_gather_into_tensor")(every, own, group=group)
    parts = every.view(recipe.ranks, -1).split(sizes, dim=1)
    return [_whole(recipe, which, part) for which, part in enumerate(parts)]


def _collective(name: str, before: str) -> Any:
    """A collective by its name since torch 2.13, or by the one before."""
    return getattr(dist, name, None) or getattr(dist, before)


def _whole(recipe: Recipe, which: int, part: Tensor) -> Tensor:
    """A parameter in memory of its own, of the ranks' shares of it (ranks, elements)."""
    shape, dim = recipe.shapes[which], recipe.dims[which]
    rows = part.reshape(recipe.ranks * recipe.chunk(which), *recipe.rest(which))[: shape[dim]].movedim(0, dim)
    return torch.empty(shape, dtype=recipe.whole, device=part.device).copy_(rows)


def _gather_fake(shards: list[Tensor], name: str) -> list[Tensor]:
    recipe = find(name)[0]
    return [shards[0].new_empty(shape, dtype=recipe.whole) for shape in recipe.shapes]


def _scatter(grads: list[Tensor], which: list[int], name: str) -> list[Tensor]:
    recipe, group, replicas = find(name)
    dtype = recipe.reduce or grads[0].dtype
    before, after = _divisors(recipe.divisor, dtype)
    sizes = [recipe.elements(k) for k in which]
    every = grads[0].new_zeros((recipe.ranks, sum(sizes)), dtype=dtype)
    for k, grad, place in zip(which, grads, every.split(sizes, dim=1), strict=True):
        rows = grad.detach().movedim(recipe.dims[k], 0)
        per_row, chunk = math.prod(recipe.rest(k)), recipe.chunk(k)
        for rank in range(recipe.ranks):
            part = rows[rank * chunk : (rank + 1) * chunk].reshape(-1)
            place[rank, : part.numel()].copy_(part)
        assert place.shape[1] == chunk * per_row
    if before != 1:
        every /= before
    own = every.new_empty(every.shape[1])
    reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
    reduce_scatter(own, every.reshape(-1), op=dist.ReduceOp.SUM, group=group)
    if replicas is not None:
        dist.all_reduce(own, op=dist.ReduceOp.SUM, group=replicas)
    own /= after
    return [_shard(recipe, k, part) for k, part in zip(which, own.split(sizes), strict=True)]


def _shard(recipe: Recipe, which: int, part: Tensor) -> Tensor:
    """The gradient of this rank's shard, of its share (elements,)."""
    shape, dim = recipe.shard_shape(which), recipe.dims[which]
    rows = part[: math.prod(shape)].reshape(shape[dim], *recipe.rest(which)).movedim(0, dim)
    return torch.empty(shape, dtype=recipe.dtype, device=part.device).copy_(rows)


def _divisors(divisor: float, dtype: torch.dtype) -> tuple[float, float]:
    """What a gradient is divided by before and after it is summed up: all of it after, but in a small range of exponents about
    the square root before, as FSDP2 does."""
    if dtype in (torch.float32, torch.float64, torch.bfloat16):
        return 1.0, divisor
    before = 1.0
    while divisor % before == 0 and divisor / before > before:
        before *= 2
    return before, divisor / before


def _scatter_fake(grads: list[Tensor], which: list[int], name: str) -> list[Tensor]:
    recipe = find(name)[0]
    return [grads[0].new_empty(recipe.shard_shape(k), dtype=recipe.dtype) for k in which]


class _Gather(torch.autograd.Function):
    """The whole parameters, by a collective or (`known`) as they are known; their gradients are scattered. Parameters that
    nothing was made of have no gradient, as ever, and no part in the collective: graphs are alike on all ranks."""

    @staticmethod
    def forward(ctx: Any, name: str, known: Sequence[Tensor], *own: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.name = name
        with below_autograd():
            return tuple(known) if known else tuple(torch.ops.deq.gather.default(list(own), name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        which = [k for k, g in enumerate(grads) if g is not None and ctx.needs_input_grad[2 + k]]
        if not which:
            return (None,) * (2 + len(grads))
        found = dict(zip(which, torch.ops.deq.scatter.default([grads[k] for k in which], which, ctx.name), strict=True))
        return (None, None, *(found.get(k) for k in range(len(grads))))


def adopted(name: str, own: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    """`gather` of shards whose whole parameters are known already."""
    return list(_Gather.apply(name, list(known), *own)) if any(s.requires_grad for s in own) else list(known)


def _gather_autograd(shards: list[Tensor], name: str) -> Sequence[Tensor]:
    if torch.is_grad_enabled() and any(s.requires_grad for s in shards):
        return list(_Gather.apply(name, (), *shards))
    with below_autograd():
        found: Sequence[Tensor] = torch.ops.deq.gather.default(shards, name)
    return found


def _scatter_autograd(grads: list[Tensor], which: list[int], name: str) -> Sequence[Tensor]:
    with below_autograd():
        found: Sequence[Tensor] = torch.ops.deq.scatter.default(grads, which, name)
    return once(found, grads, "parameters that are not sharded") if torch.is_grad_enabled() else found


library.impl("gather", _gather, "CompositeExplicitAutograd")
library.impl("gather", _gather_autograd, "Autograd")
library.impl("scatter", _scatter, "CompositeExplicitAutograd")
library.impl("scatter", _scatter_autograd, "Autograd")
torch.library.register_fake("deq::gather", _gather_fake, lib=library)
torch.library.register_fake("deq::scatter", _scatter_fake, lib=library)
gather_op = torch.ops.deq.gather.default
