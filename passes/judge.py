"""Refuse what only looks like a fixed-point loop.

A chain of equal segments is one map applied again and again only if the map is a function of what it reads. This pass
runs one segment on fake tensors, watches every ATen call, and refuses random numbers, batch statistics that are updated,
assertions, writes to what outlives the body, and states that are not real floating-point tensors. Every refusal names the line.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from deq_compile.region.modes import Ambient
from deq_compile.report import Reason, Skipped
from deq_compile.torch_parts import FakeTensorMode, HigherOrderOperator, TorchDispatchMode, pytree, schema_of, storage_id

from .ambient import GRAD_TARGETS, ambient_at
from .base import Loop, Pass, PassContext, describe, hint, location_of, value_of
from .reversals import kept_for_backward

Refusal = tuple[Reason, fx.Node, str]

_ASSERTIONS = ("aten::_assert_async", "aten::_functional_assert_async")  # what `assert` of a tensor becomes
_LEAST_TELLING = (Reason.MUTATION, Reason.GRAD_MODE)
_TELLING: list[Reason] = [*(r for r in Reason if r not in _LEAST_TELLING), *_LEAST_TELLING]


class Judge(Pass):
    name = "judge"

    def __init__(self, ambient: Ambient) -> None:
        self.ambient = ambient

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        accepted = []
        for loop in context.loops:
            refusals = self._structure(loop) or self._behaviour(graph, loop)
            if (keeper := kept_for_backward(graph, loop, self.ambient, context.function)) is not None:
                refusals.append((Reason.STATES_KEPT, loop.outputs[0], keeper))
            if not refusals:
                accepted.append(loop)
                continue
            # A batch-norm also counts its calls, a spectral norm also switches gradients off: name what the user would.
            reason, node, detail = min(refusals, key=lambda refusal: _TELLING.index(refusal[0]))
            place = location_of(node)
            context.skip(Skipped(reason, place if place.file else loop.location, detail or describe(node), loop.count))
        context.loops = accepted
        return len(accepted)

    def _structure(self, loop: Loop) -> list[Refusal]:
        for node in loop.outputs:
            value = value_of(node)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.layout != torch.strided:
                return [(Reason.NOT_FLOATING, node, str(getattr(value, "dtype", type(value).__name__)))]
        inside = {node: offset for offset, node in enumerate(loop.segment(-1))}
        for node in loop.invariants:
            value = value_of(node)
            if isinstance(value, torch.Tensor | torch.SymInt | int):
                continue
            if loop.tests and all(u in inside and inside[u] in loop.test_offsets for u in node.users if u in inside):
                continue  # the graphs of the tests have been made already
            reason = Reason.CONTROL_FLOW if node.op == "get_attr" else Reason.NON_TENSOR
            return [(reason, loop.segment(0)[0], str(node.target) if node.op == "get_attr" else node.name)]
        for node in loop.segment(-1):
            if isinstance(node.target, HigherOrderOperator):
                return [(Reason.CONTROL_FLOW, node, "")]
        return []

    def _behaviour(self, graph: fx.Graph, loop: Loop) -> list[Refusal]:
        """Run the last segment on fake tensors and look at what it calls."""
        segment = [node for offset, node in enumerate(loop.segment(-1)) if offset not in loop.test_offsets]
        values: dict[fx.Node, Any] = {}
        refusals: list[Refusal] = []
        # A mode of its own, with the sizes of this call as numbers: Dynamo's would turn questions into guards.
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def read(node: fx.Node) -> Any:
            if node not in values:
                values[node] = pytree.tree_map(_concrete, value_of(node))
            return values[node]

        ambient = ambient_at(graph, loop.first, self.ambient)
        with torch.no_grad(), ambient.autocast_entered(), mode:
            for node in segment:
                if node.target in GRAD_TARGETS:
                    refusals.append((Reason.GRAD_MODE, node, ""))
                    continue
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
                watch = _Watch(_tensors((args, kwargs)))
                try:
                    with watch:
                        values[node] = _call(node, args, kwargs)
                except Exception as error:  # whatever an operation raises on fake tensors: the loop is left alone
                    return [*refusals, (Reason.UNTRACEABLE, node, f"{describe(node)}: {type(error).__name__}: {error}")]
                if watch.refusal is not None:
                    refusals.append((watch.refusal, node, describe(node)))
        return refusals


def _concrete(value: Any) -> Any:
    """A tensor or a size with numbers for symbols; to be called under a fake mode."""
    if isinstance(value, torch.Tensor):
        sizes, strides = [hint(s) for s in value.shape], [hint(s) for s in value.stride()]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return hint(value) if isinstance(value, torch.SymInt) else value


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise TypeError(f"unexpected {node.op} node")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return storage_id(tensor) if tensor.layout is torch.strided else id(tensor)


class _Watch(TorchDispatchMode):
    """Looks at the ATen calls of one graph node. A composite may write to temporaries of its own, not to its inputs."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.inputs = {_storage(t) for t in inputs}
        self.refusal: Reason | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = schema_of(func).arguments  # the dispatcher drops arguments that equal their defaults
        named = {a.name: a.default_value for a in arguments if a.has_default_value()}
        named |= {a.name: v for a, v in zip(arguments, args, strict=False)} | kwargs
        if torch.Tag.nondeterministic_seeded in func.tags and not _no_randomness(named):
            self.refusal = Reason.RANDOM
        if func.name().startswith(_ASSERTIONS):
            self.refusal = Reason.ASSERTION
        training = named.get("training", named.get("train"))
        if "batch_norm" in func.name() and training is True and named.get("running_mean") is not None:
            self.refusal = Reason.BATCH_NORM
        if schema_of(func).is_mutable:
            for argument in arguments:
                value = named.get(argument.name)
                if argument.is_write and isinstance(value, torch.Tensor) and _storage(value) in self.inputs:
                    self.refusal = self.refusal or Reason.MUTATION
        return func(*args, **kwargs)


def _no_randomness(named: dict[str, Any]) -> bool:
    """Dropout switched off: attention kernels carry the seeded tag whatever their dropout probability is."""
    if named.get("train") is False:
        return True
    probability = named.get("dropout_p", named.get("p"))
    return probability is not None and probability == 0
