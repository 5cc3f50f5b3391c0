"""Modules that FSDP2 shards, called in a loop: their parameters are gathered once for the whole graph, as operands.

    fully_shard(model.cell)
    for _ in range(100):
        z = self.cell(z, x)      # FSDP2 gathers before and frees behind each of these calls; stock Dynamo ends its graph here

FSDP2 does so in hooks of the module. Where a loop of the user's, or a solver, calls such a module, Dynamo does not go into them:
before the call the parameters' places get what `deq::gather` made of the shards (one node for each module and graph, at its top),
after it they get the shards back. Casts of a mixed-precision policy stay where they were. A graph in which no region came of it
is traced again with the hooks left to Dynamo.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deq_compile import fsdp_parts
from deq_compile.fsdp_parts import NotGathered, Places, Policy
from deq_compile.markers import NOT_THE_USERS, region
from deq_compile.region import shards
from deq_compile.report import Reason, Skipped

from . import dynamo, sites
from .bytecode import code_of


@dataclasses.dataclass
class _Held:
    """A module whose parameters this graph has gathered: Dynamo's variables of the shards and of what was made of them."""

    places: tuple[Places, ...]
    policy: Policy
    sharded: list[Any]
    whole: list[Any]
    site: str
    told: Skipped  # should it be given back
    declared: bool = False  # called by an adapter that stands for a solver, which calls it once
    calls: int = 0
    entered: int = 0  # calls at work


def install() -> Callable[[], None]:
    """Patch Dynamo; returns what takes the patch out again."""
    original = dynamo.UserFunctionVariable.call_function

    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        which = fsdp_parts.hook_name(self.fn)
        if which and not kwargs and sites.ours(tx):
            with sites.guarded(tx, "tracing a call of a sharded module"):
                found = _hook(tx, which, [*self.self_args(), *args])
            if found is not None:
                return found
        return original(self, tx, args, kwargs)

    dynamo.UserFunctionVariable.call_function = call_function

    def take_out() -> None:
        dynamo.UserFunctionVariable.call_function = original

    return take_out


def _hook(tx: Any, which: str, given: Sequence[Any]) -> Any:
    """What a hook returns; None where it is left to Dynamo."""
    owner, module, *rest = given
    table: dict[int, _Held] = tx.output.__dict__.setdefault("_deq_compile_sharded", {})
    state = owner.value
    held = table.get(id(state))
    if which == "after":
        if held is None or not held.entered:
            return None
        held.entered -= 1
        return _run(tx, _left, [module, held.places, held.policy.outputs, rest[-1], *held.sharded])
    declared = any(frame.f_code is region.__code__ for frame in dynamo.frames(tx))
    if held is None:
        if not (declared or _in_loop(tx)):
            return None
        site = sites.site_of(tx, "sharded")
        if sites.blocked(tx, site):
            return None
        try:
            held = table[id(state)] = _gathered(tx, state, module, site)
        except NotGathered as why:
            skipped = _skipped(tx, module)
            sites.refuse(tx, site, dataclasses.replace(skipped, detail=f"{skipped.detail}: {why}"))
            return None
    held.entered += 1
    held.calls += 1
    held.declared = held.declared or declared
    return _run(tx, _entered, [module, held.places, held.policy.inputs, *rest[:2], *held.whole])


def _in_loop(tx: Any) -> bool:
    """Whether the module is called in a loop of the user's, in this frame or in one that called it."""
    return any(
        code_of(frame).in_loop(frame.current_instruction)
        for frame in dynamo.frames(tx)
        if not frame.f_code.co_filename.startswith(NOT_THE_USERS) and frame.current_instruction is not None
    )


def _gathered(tx: Any, state: Any, module: Any, site: str) -> _Held:
    """Put the gathering of a module's parameters at the top of the graph.

    Raises:
        NotGathered: it has to be left to FSDP2.
    """
    if getattr(tx.output.current_tracer, "parent", None) is not None:
        raise NotGathered("it is called inside of a checkpoint or another operator with a body")
    _, parameters, policy = fsdp_parts.plan_of(state)
    places = tuple(parameter.places for parameter in parameters)
    sharded = [_variable(tx, module, those[0]) for those in places]
    parts = [(which, shards.recipe_of([parameters[k] for k in which], policy)) for which in shards.parts(parameters)]
    whole: list[Any] = [None] * len(parameters)
    with dynamo.at_top_of_graph(tx):
        for which, name in parts:
            own = [sharded[k].call_method(tx, "to_local", [], {}) for k in which]
            for k, made in zip(which, dynamo.call_operator(tx, shards.gather_op, own, name, len(which)), strict=True):
                whole[k] = made
    return _Held(places, policy, sharded, whole, site, _skipped(tx, module))


def _skipped(tx: Any, module: Any) -> Skipped:
    return Skipped(Reason.SHARDED, sites.location(tx), type(module.value).__name__.removeprefix("FSDP"))


def _variable(tx: Any, module: Any, place: tuple[Sequence[str], str]) -> Any:
    path, name = place
    for step in (*path, name):
        module = dynamo.attribute(tx, module, step)
    return module.realize() if hasattr(module, "realize") else module


def _run(tx: Any, function: Callable[..., Any], given: Sequence[Any]) -> Any:
    variables = [v if isinstance(v, dynamo.VariableTracker) else dynamo.build(tx, v) for v in given]
    return dynamo.UserFunctionVariable(function).call_function(tx, variables, {})


def _entered(module: nn.Module, places: Any, dtype: Any, args: Any, kwargs: Any, *whole: Any) -> Any:
    """What Dynamo traces in place of the hook before a call."""
    fsdp_parts.put(module, places, *whole)
    return fsdp_parts.cast(args, dtype), fsdp_parts.cast(kwargs, dtype)


def _left(module: nn.Module, places: Any, dtype: Any, output: Any, *sharded: Any) -> Any:
    """What Dynamo traces in place of the hook behind a call."""
    fsdp_parts.put(module, places, *sharded)
    return fsdp_parts.cast(output, dtype)


def unused(regions: int) -> list[str]:
    """The sites of modules that were gathered for nothing in the frame at work, since it has no region, or that should not be;
    that is told."""
    tx = dynamo.current()
    held: dict[int, _Held] = {} if tx is None else getattr(tx.output, "_deq_compile_sharded", {})
    if not regions:
        return [one.site for one in held.values()]
    refused = [(one, why) for one in held.values() if (why := _why_not(one))]
    for one, why in refused:
        sites.tell(tx, dataclasses.replace(one.told, detail=f"{one.told.detail}: {why}"))
    return [one.site for one, _ in refused]


def _why_not(held: _Held) -> str:
    """Why a module is left to FSDP2 after all; "" if it is not."""
    if held.calls < 2 and not held.declared:
        return (
            "it is called once, as a layer is, and all of them would be held whole. Fix: a module of its own for the other loop"
        )
    if any(len(shard.as_proxy().node.users) > 1 for shard in held.sharded):  # what is gathered at the top knows of no writing
        return "the graph does something else with its shards. Fix: outside of the function that holds the loop"
    return ""
