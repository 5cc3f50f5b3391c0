"""Where a fixed point is asked for: a solver looks at numbers, and not every place has them.

Fake and meta tensors have shapes only, and one evaluation of f tells those. A tracer would record the steps of one solve, or
f once, as if they were the model; a torch.func transform and forward-mode AD would differentiate through the solver's steps, or
not at all. These get one sentence each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deq_compile import torch_parts
from deq_compile.torch_parts import (
    BATCHED,
    Absent,
    FakeTensor,
    dispatch_mode,
    dispatch_mode_key,
    forward_mode,
    is_functorch_wrapped,
    is_jit_tracing,
    is_wrapper_subclass,
    lost,
    proxy_mode,
    pytree,
    transform,
)

# No tensor is of a kind that this torch does not have; no graph is rewritten then, and what is solved outside of them goes on.
_FAKE: tuple[type, ...] = () if isinstance(FakeTensor, Absent) else (FakeTensor,)
_WRAPPED = tuple(test for test in (is_wrapper_subclass, is_functorch_wrapped) if not isinstance(test, Absent))

NO_TANGENT = (
    "a compiled fixed point has no forward-mode derivative: the tangent that f's inputs carry would be lost. Fix: reverse mode "
    "(torch.autograd.grad, torch.autograd.functional.jacobian), or deq_compile.fixed_point in eager mode"
)
NO_VMAP = (
    "torch.func.vmap around a compiled fixed-point region is not implemented. Fix: vmap inside of the compiled function, or a "
    "batch in dimension 0"
)
_COMPILE = "Fix: torch.compile(model, backend='deq'), which makes it one operator of a graph"


class NotHere(RuntimeError):
    """A fixed point was asked for where it can be neither solved nor given a shape."""


def values_are_known(states: Sequence[Tensor]) -> bool:
    """Whether a solver can run on these tensors here. False: they have shapes and no values.

    Raises:
        NotHere: inside of a tracer or of a torch.func transform.
    """
    if is_jit_tracing():
        raise NotHere(
            "fixed_point cannot be traced by torch.jit.trace: the number of its iterations depends on data, and the trace would "
            "hold that of one example. Fix: torch.export.export, which makes a loop of it"
        )
    if proxy_mode() is not None:
        raise NotHere(
            "fixed_point cannot be traced by make_fx: the number of its iterations depends on data. "
            f"{_COMPILE}; or torch.export.export, which makes a loop of it"
        )
    outer = transform()
    if outer is not None and _name_of(outer) == "functionalize":
        raise NotHere(
            "fixed_point cannot run inside of torch.func.functionalize, which would go through the solver's own steps. Fix: "
            "functionalize f"
        )
    return not (_inside_fake_mode() or any(s.device.type == "meta" or isinstance(s, _FAKE) for s in states))


def _name_of(interpreter: Any) -> str:
    return str(interpreter.key()).rpartition(".")[2].lower()


def inside_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, vjp, jvp and what is made of them) is at work."""
    return transform() is not None


def any_tangent(tensors: Sequence[Any]) -> bool:
    """Whether forward-mode AD is at work on one of the tensors."""
    return forward_mode() and any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def for_each_of_batch(function: Callable[..., list[Tensor]], *given: Any) -> list[Tensor]:
    """function(*given), where some tensors in `given` are vmap's: called for one of the batch after the other, outside of it.

    There are two kinds of such tensors: those of torch.func.vmap, and those of `torch.autograd.grad(is_grads_batched=True)`.

    Raises:
        NotHere: vmap inside of vmap; a torch without the parts for it.
    """
    if BATCHED in lost():
        raise NotHere(f"fixed point: gradients cannot be batched, {lost()[BATCHED]}. Fix: one torch.autograd.grad for each")
    batched = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and is_batched((t,))]
    wrap: Callable[[Tensor, int, int], Tensor]
    if torch_parts.is_batched_by_autograd(batched[0]):
        level, outside, wrap = torch_parts.vmapmode_increment() - 1, contextlib.nullcontext, torch_parts.add_batch_dim
        torch_parts.vmapmode_decrement()
        whole = {id(t): torch_parts.remove_batch_dim(t, level, 1, 0) for t in batched}
    else:
        level, outside = torch_parts.batch_level(batched[0]), torch_parts.transforms_put_aside
        wrap = torch_parts.batch_again
        whole = {id(t): torch_parts.unbatched(t).movedim(torch_parts.batch_dim(t), 0) for t in batched}
    if is_batched(list(whole.values())):
        raise NotHere("fixed point: gradients that are batched twice are not implemented. Fix: one torch.autograd.grad for each")
    with outside():
        found = [
            function(*pytree.tree_map(lambda t: whole[id(t)][i] if id(t) in whole else t, given))  # noqa: B023 (called at once)
            for i in range(len(next(iter(whole.values()))))
        ]
        stacked = [torch.stack(parts) for parts in zip(*found, strict=True)]
    return [wrap(s, 0, level) for s in stacked]


def is_batched(tensors: Sequence[Any]) -> bool:
    """Whether vmap is at work on one of the tensors."""
    return any(isinstance(t, Tensor) and (torch_parts.is_batched(t) or torch_parts.is_batched_by_autograd(t)) for t in tensors)


def plain(tensor: Tensor) -> bool:
    """Whether a tensor has numbers of its own, in strides: what a solver's kernels can be given the address of."""
    return tensor.layout is torch.strided and not any(test(tensor) for test in _WRAPPED)


def transformed(tensor: Tensor) -> bool:
    """Whether a tensor is one of a torch.func transform's."""
    return not isinstance(is_functorch_wrapped, Absent) and bool(is_functorch_wrapped(tensor))


def _inside_fake_mode() -> bool:
    return dispatch_mode_key is not None and dispatch_mode(dispatch_mode_key.FAKE) is not None
