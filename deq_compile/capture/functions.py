"""Fixed points in `torch.autograd.Function`s, taken over while Dynamo traces `Function.apply`.

    fz = f(zs, x)                                  # zs = z.detach().requires_grad_()
    out = Attach.apply(z, (zs, fz), x, *params)    # its backward solves w = q + J^T w with autograd.grad(fz, zs, w)

A backward that differentiates inside of itself cannot be traced. Where a trial (families/adjoints.py) shows that it attaches an
implicit gradient, or the first terms of the Neumann series, an `adjoint_hook` says so in the graph, as for a hook on z. Else
the function stays outside of the graph, the report says so, and the backward stays the user's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deq_compile import markers
from deq_compile.families.adjoints import Adjoint, Toy, kind_of, through_function
from deq_compile.families.functions import differentiates_inside
from deq_compile.passes.copies import source_of
from deq_compile.report import Reason, Skipped

from . import dynamo, sites, toys

_FIX = "{name}.backward differentiates f again; z = deq_compile.fixed_point(lambda z: f(z, x), z0) in the place of {name}.apply"


def install() -> Callable[[], None]:
    """Patch Dynamo; returns what takes the patch out again."""
    original = dynamo.AutogradFunctionVariable.call_apply

    @functools.wraps(original)
    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        with sites.guarded(tx, "looking at an autograd function"):
            if sites.ours(tx) and differentiates_inside(self.fn_cls):
                taken = None if kwargs else _take(tx, self.fn_cls, args)
                if taken is not None and not isinstance(taken, str):
                    return taken
                detail = f"{taken}; " if taken else ""
                detail += _FIX.format(name=self.fn_cls.__name__)
                sites.tell(tx, Skipped(Reason.AUTOGRAD_FUNCTION, sites.location(tx), detail))
        return original(self, tx, args, kwargs)

    dynamo.AutogradFunctionVariable.call_apply = call_apply

    def remove() -> None:
        dynamo.AutogradFunctionVariable.call_apply = original

    return remove


def _take(tx: Any, function: Any, args: Sequence[Any]) -> Any:
    """The variable of z with its gradient; a text, or None, where the function stays."""
    site = sites.site_of(tx, "autograd function", f"{function.__module__}.{function.__qualname__}")
    if sites.blocked(tx, site) or not torch.is_grad_enabled():
        return None
    tensors = {id(toys.node_of(t)): t for a in args for t in toys.tensors_in(tx, a)}
    step = toys.step_in(tensors.values())
    if step is None:
        return None
    z0, f = step
    others = [t for t in tensors.values() if t is not z0 and t is not f]
    inputs = [t for t in others if t.requires_grad]
    if not toys.covered(f, [z0, *inputs]):
        return "its backward differentiates with respect to less than what f depends on"

    def arguments(toy: Toy) -> list[Any]:
        roles = {id(toys.node_of(z0)): toy.z0, id(toys.node_of(f)): toy.f}
        roles |= {id(toys.node_of(t)): _like(t, z0, toy, 2.0 + i) for i, t in enumerate(others)}
        roles |= {id(toys.node_of(t)): x for t, x in zip(inputs, toy.inputs, strict=True)}
        return [toys.value_for(tx, a, roles) for a in args]

    adjoint = kind_of(through_function(function.apply, arguments), z0.ndim, len(inputs))
    if not isinstance(adjoint, Adjoint):
        return adjoint
    proxy = tx.output.create_proxy("call_function", markers.adjoint_hook, toys.hook_arguments(f, f, z0, site, adjoint), {})
    return dynamo.wrap_fx_proxy(tx, proxy)


def _like(tensor: Any, z0: Any, toy: Toy, factor: float) -> torch.Tensor:
    """z where a tensor is z; else a tensor that the function must not take for it."""
    is_z = source_of(toys.node_of(tensor)) is source_of(toys.node_of(z0))
    return toy.z0.detach() * (1.0 if is_z else factor)
