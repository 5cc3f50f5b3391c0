"""A function that nobody traced, and that calls modules which FSDP2 shards: their parameters are gathered once for all its calls.

FSDP2 gathers in a hook before each call of such a module and frees in one behind it. A solve calls it as often as its rank needs,
and its adjoint takes as many products: ranks that need different numbers of collectives would wait for each other forever. So the
first evaluation shows which modules are called, and what FSDP2 has gathered for it is kept; from the second on they are called
without FSDP2's hooks, with those tensors in their parameters' places. Gradients go through `shards.adopted`, one reduce-scatter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deq_compile import fsdp_parts
from deq_compile.fsdp_parts import NotGathered, Places, Policy

from . import shards
from .surroundings import NotHere

Body = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclasses.dataclass
class _Held:
    """A module, FSDP2's state of it, and the tensors that stand in its parameters' places while it is called."""

    module: nn.Module
    state: Any
    places: tuple[Places, ...]
    policy: Policy
    sharded: list[Any]
    whole: list[Tensor]


def held_once(f: Body, where: str) -> Body:
    """`f`, with the parameters of sharded modules that it calls gathered at its first call; `f` itself where there can be none.

    Raises:
        NotHere (at the first call): a module whose parameters only FSDP2 can gather.
    """
    return _HeldOnce(f, where) if fsdp_parts.in_use() else f


class _HeldOnce:
    def __init__(self, f: Body, where: str) -> None:
        self.f, self.where = f, where
        self.held: list[_Held] | None = None

    def __call__(self, states: list[Tensor]) -> Sequence[Tensor]:
        if self.held is None:
            found, seen = self._first(states)
            self.held = [self._hold(*one) for one in seen.values()]
            if not torch.is_grad_enabled():  # else this evaluation is the attached one: a state without elements needs no other
                return found
        with contextlib.ExitStack() as stack:
            for held in self.held:
                stack.enter_context(_without_hooks(held))
            return self.f(states)

    def _first(self, states: list[Tensor]) -> tuple[Sequence[Tensor], dict[int, tuple[Any, dict[Any, Tensor]]]]:
        """f, and of each sharded module that it calls FSDP2's state, and copies of its parameters by place."""
        seen: dict[int, tuple[Any, dict[Any, Tensor]]] = {}
        thread = threading.get_ident()

        def look(module: nn.Module, *_: Any) -> None:  # comes before FSDP2's own hook, which frees the parameters
            state = fsdp_parts.state_of(module)
            if state is not None and id(state) not in seen and threading.get_ident() == thread:
                seen[id(state)] = state, {place: p.detach().clone() for place, p in fsdp_parts.parameters(module)}

        with nn.modules.module.register_module_forward_hook(look), torch.no_grad():
            return self.f(states), seen

    def _hold(self, state: Any, copies: dict[Any, Tensor]) -> _Held:
        fsdp_parts.reshard(state)
        try:
            module, parameters, policy = fsdp_parts.plan_of(state)
            names = [(which, shards.recipe_of([parameters[k] for k in which], policy)) for which in shards.parts(parameters)]
        except NotGathered as why:
            raise NotHere(
                f"fixed_point at {self.where}: f calls a module that FSDP2 shards, and {why}: its parameters cannot be gathered "
                "once for the solve. Fix: fully_shard the module that calls fixed_point, and not the one that f calls"
            ) from why
        whole: list[Any] = [None] * len(parameters)
        with torch.enable_grad():
            for which, name in names:
                own = [parameters[k].parameter.to_local() for k in which]
                known = [copies[parameters[k].places[0]] for k in which]
                for k, made in zip(which, shards.adopted(name, own, known), strict=True):
                    whole[k] = made
        places = tuple(p.places for p in parameters)
        return _Held(module, state, places, policy, [p.parameter for p in parameters], whole)


@contextlib.contextmanager
def _without_hooks(held: _Held) -> Iterator[None]:
    """Calls of a module with the gathered tensors, and casts as its policy has them."""
    fsdp_parts.put(held.module, held.places, *held.whole)
    casts = held.policy.inputs, held.policy.outputs
    try:
        with contextlib.contextmanager(fsdp_parts.without_hooks)(held.module, held.state), _casting(held.module, *casts):
            yield
    finally:
        fsdp_parts.put(held.module, held.places, *held.sharded)


@contextlib.contextmanager
def _casting(module: nn.Module, inputs: torch.dtype | None, outputs: torch.dtype | None) -> Iterator[None]:
    """What a mixed-precision policy does before and behind a module's calls."""
    handles = []
    if inputs is not None:
        to_inputs = functools.partial(fsdp_parts.cast, dtype=inputs)
        handles.append(
            module.register_forward_pre_hook(lambda _, args, kwargs: (to_inputs(args), to_inputs(kwargs)), with_kwargs=True)
        )
    if outputs is not None:
        handles.append(module.register_forward_hook(lambda _, __, output: fsdp_parts.cast(output, dtype=outputs)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
