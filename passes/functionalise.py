"""Turn in-place operations on the graph's own temporaries into their functional twins.

`nn.ReLU(inplace=True)`, `y += x`, `y.add_(x)` and `y[:, 0] = x` are common in real loop bodies, and hide the data flow
from a pass that compares segments. Where the written storage was made in this graph and no other name of it is read
afterwards, the operation is replaced by its functional twin and later uses of the old name are moved to the new one.
Anything else is left as it stands; `judge` then refuses a loop that contains it.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from deq_compile.torch_parts import storage_id

from .base import Pass, PassContext, is_tensor, value_of

_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.imod: operator.mod,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
# Tensor methods that end in "_" but are no arithmetic with a functional twin of the same name.
_RANDOM = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_"}
_METADATA = {"requires_grad_", "detach_", "set_", "resize_", "share_memory_", "as_strided_", "squeeze_", "unsqueeze_", "rename_"}
_NO_TWIN = _RANDOM | _METADATA | {"transpose_", "t_", "swapaxes_", "swapdims_", "index_put_", "put_", "apply_", "map_"}

Twin = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def storage_of(node: fx.Node) -> int | None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return storage_id(value)


def written_argument(node: fx.Node) -> fx.Node | None:
    """The tensor argument that a node writes in place, as far as its spelling tells; None for all other nodes."""
    if not node.args or not isinstance(node.args[0], fx.Node) or not is_tensor(node.args[0]):
        return None
    target = node.target
    if node.op == "call_method":
        name = str(target)
        return node.args[0] if name.endswith("_") and not name.endswith("__") else None
    if node.op != "call_function":
        return None
    if target in _OPERATORS or target is operator.setitem:
        return node.args[0]
    if _inplace_argument(node) is not None:
        return node.args[0]
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return node.args[0]
    return None


def _inplace_argument(node: fx.Node) -> tuple[str, int] | None:
    """Name and position of a true `inplace` argument of a torch.nn.functional call."""
    if "inplace" in node.kwargs:
        return ("inplace", -1) if node.kwargs["inplace"] is True else None
    if not callable(node.target) or not getattr(node.target, "__module__", "").startswith("torch.nn.functional"):
        return None
    try:
        parameters = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):
        return None
    if "inplace" not in parameters:
        return None
    position = parameters.index("inplace")
    return ("inplace", position) if len(node.args) > position and node.args[position] is True else None


def with_item(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """The twin of `tensor[index] = value`."""
    result = tensor.clone()
    result[index] = value
    return result


def with_copy(tensor: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The twin of `tensor.copy_(source)`: broadcast to the shape, and cast to the dtype, of `tensor`."""
    return torch.empty_like(tensor).copy_(source, non_blocking)


class Functionalise(Pass):
    name = "functionalise"

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        for node in graph.nodes:
            if node.target is operator.setitem:
                _part_by_part(node)
        order = {node: i for i, node in enumerate(graph.nodes)}
        foreign = {storage_of(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
        names: dict[int, list[fx.Node]] = defaultdict(list)
        writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            storage = storage_of(node)
            if storage is not None and storage not in foreign:
                names[storage].append(node)
            written = written_argument(node)
            storage = storage_of(written) if written is not None else None
            if storage is not None and storage not in foreign:
                writers[storage].append(node)
        # A storage is rewritten as a whole or not at all: after a twin, other names would show the old value.
        return sum(_rewrite(graph, names[storage], found, order) for storage, found in writers.items())


def _part_by_part(store: fx.Node) -> None:
    """`y[i] += x` is read, add in place, write back: the middle need not be in place, since the last does it all."""
    base, index, value = store.args
    if not isinstance(value, fx.Node) or value.target not in _OPERATORS or len(value.users) > 1:
        return
    part = value.args[0]
    if not isinstance(part, fx.Node) or part.target is not operator.getitem or len(part.users) > 1:
        return
    if part.args[0] is base and str(part.args[1]) == str(index) and value.next is store:
        twin = _OPERATORS[value.target]
        other = value.args[1]
        if isinstance(other, fx.Node) and is_tensor(other) and value_of(other).dtype != value_of(part).dtype:
            return
        value.target = twin
        value.meta["example_value"] = value_of(part).clone()


def _rewrite(graph: fx.Graph, names: list[fx.Node], writers: list[fx.Node], order: dict[fx.Node, int]) -> int:
    if any(_twin(node) is None for node in writers) or not _names_are_linear(names, writers, order):
        return 0
    for node in writers:
        twin = _twin(node)  # only now: the writers before have renamed its arguments
        assert twin is not None
        _replace(graph, node, twin, order)
    return len(writers)


def _names_are_linear(names: list[fx.Node], writers: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether every name of a storage that is read after a write is the written name or the write's result."""
    for writer in writers:
        target = written_argument(writer)
        for name in names:
            if name is target or name is writer or order[name] > order[writer]:
                continue  # names made after the write see the new value
            if any(order[user] > order[writer] for user in name.users):
                return False
    return True


def _twin(node: fx.Node) -> Twin | None:
    """(op, target, args, kwargs) of the functional twin."""
    target = node.target
    if target is operator.setitem:
        return "call_function", with_item, node.args, {}
    if node.op == "call_method":
        name = str(target)
        twin = name[:-1]
        if name == "copy_":
            return "call_function", with_copy, node.args, dict(node.kwargs)
        if name == "fill_" or name == "zero_":
            return _constant_twin(node, name)
        if name in _NO_TWIN or not hasattr(torch.Tensor, twin):
            return None
        return "call_method", twin, node.args, dict(node.kwargs)
    if target in _OPERATORS:
        return "call_function", _OPERATORS[target], node.args, dict(node.kwargs)
    inplace = _inplace_argument(node)
    if inplace is not None:
        name, position = inplace
        args = tuple(False if i == position else a for i, a in enumerate(node.args))
        kwargs = {k: (False if k == name else v) for k, v in node.kwargs.items()}
        return "call_function", target, args, kwargs
    name = getattr(target, "__name__", "")
    twin_function = getattr(torch, name[:-1], None) or getattr(torch.nn.functional, name[:-1], None)
    if name in _NO_TWIN or twin_function is None or not callable(twin_function):
        return None
    return "call_function", twin_function, node.args, dict(node.kwargs)


def _constant_twin(node: fx.Node, name: str) -> Twin | None:
    if name == "zero_":
        return "call_function", torch.zeros_like, (node.args[0],), {}
    source = node.args[1] if len(node.args) > 1 else None
    if name == "fill_" and isinstance(source, int | float | bool):
        return "call_function", torch.full_like, (node.args[0], source), {}
    return None


def _replace(graph: fx.Graph, node: fx.Node, twin: Twin, order: dict[fx.Node, int]) -> None:
    op, target, args, kwargs = twin
    old = node.args[0]
    assert isinstance(old, fx.Node)
    value = value_of(old if target is with_item else node)  # setitem returns None
    with graph.inserting_before(node):
        new = graph.create_node(op, target, args, kwargs)
        new.meta = dict(node.meta)
        result = new
        other = next((value_of(a) for a in args[1:] if isinstance(a, fx.Node)), None)
        keeps_dtype = target in (with_item, with_copy)
        if not keeps_dtype and isinstance(other, torch.Tensor) and other.dtype != value.dtype:
            # in place keeps the dtype of the left operand, the twin promotes
            result = graph.call_method("to", (new, value.dtype))
            result.meta = dict(node.meta)
            new.meta["example_value"] = None
    # With its own storage from here on; a fake clone keeps shape, stride, dtype and the gradient flag.
    with torch.no_grad():
        result.meta["example_value"] = value.clone().requires_grad_(value.requires_grad)
    order[new] = order[result] = order[node]
    node.replace_all_uses_with(result)
    for user in [u for u in old.users if order[u] > order[node]]:
        user.replace_input_with(old, result)
    graph.erase_node(node)
