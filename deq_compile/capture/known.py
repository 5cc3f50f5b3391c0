"""Tensors whose numbers are known while a graph is traced: those made of constants alone.

mask = torch.triu(torch.ones(n, n), 1)
if mask is not None and mask.any().item():      # stock Dynamo breaks the graph here
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch

from deq_compile.passes.functionalise import storage_of, written_argument
from deq_compile.torch_parts import OpOverload

MOST_NODES, MOST_ELEMENTS = 64, 1 << 22


class Known(NamedTuple):
    """A tensor, and what tells the Python values that it was made of from others."""

    value: torch.Tensor
    constants: int


def value_of(variable: Any) -> Known | None:
    """The value of a tensor variable; None where it depends on an input, a parameter, a random number or a write in place."""
    nodes = _closed(variable.as_proxy().node)
    if nodes is None:
        return None
    env: dict[Any, Any] = {}
    try:
        with torch.no_grad():
            for node in nodes:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                if node.op == "call_function":
                    env[node] = node.target(*args, **kwargs)
                else:
                    env[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
    except Exception:  # an operation that does not run outside of the graph
        return None
    found = env[nodes[-1]]
    constants = hash(repr([torch.fx.node.map_arg((node.args, node.kwargs), lambda _: None) for node in nodes]))
    return Known(found, constants) if isinstance(found, torch.Tensor) else None


def _closed(node: Any) -> list[Any] | None:
    """A node with all that it is computed from, in graph order, if those are functions of constants."""
    found, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if not _is_a_function(current) or len(found) > MOST_NODES:
            return None
        for a in current.all_input_nodes:
            if a not in found:
                found.add(a)
                stack.append(a)
    storages = {storage_of(n) for n in found} - {None}
    if any(storage_of(a) in storages for n in node.graph.nodes for a in _written(n)):
        return None
    return [n for n in node.graph.nodes if n in found]


def _is_a_function(node: Any) -> bool:
    if node.op not in ("call_function", "call_method") or (node.op == "call_function" and not _of_torch(node.target)):
        return False
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    tags = getattr(node.target, "tags", ())
    random = any(word in name for word in _RANDOM) or torch.Tag.nondeterministic_seeded in tags
    value = node.meta.get("example_value")
    small = not isinstance(value, torch.Tensor) or (all(type(s) is int for s in value.shape) and value.numel() <= MOST_ELEMENTS)
    return not random and not node.is_impure() and small


def _of_torch(target: Any) -> bool:
    """Whether a function is torch's or Python's own: any other may read more than its arguments."""
    if isinstance(target, OpOverload):
        return target.namespace in ("aten", "prims")
    module = getattr(target, "__module__", None) or ""
    return isinstance(target, types.BuiltinFunctionType) or module == "_operator" or module.split(".")[0] == "torch"


_RANDOM = ("rand", "rng", "seed", "dropout", "normal", "bernoulli", "multinomial", "uniform", "empty", "exponential")


def _written(node: Any) -> list[Any]:
    """The tensors that a node writes in place, or under a name of theirs."""
    out = node.kwargs.get("out")
    outs = out if isinstance(out, tuple | list) else (out,)
    return [a for a in (written_argument(node), *outs) if isinstance(a, torch.fx.Node)]
