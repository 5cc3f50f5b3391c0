"""Bodies that look something up by an index made of the state: `table[(10 * z).long()]`.

The user's loop may stay within the table where an iterate of a solver's does not. ATen raises then, and the solve has missed
(:mod:`.domain`); what Inductor compiles checks indices too, but raises inside of an OpenMP region, which ends the process. So
such a body runs by its traced ATen graphs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_LOOKUPS = {
    "index", "index_put", "index_select", "index_add", "index_copy", "index_fill", "index_reduce", "embedding", "embedding_bag",
    "embedding_dense_backward", "gather", "take", "put", "scatter", "scatter_add", "scatter_reduce", "nll_loss_forward",
    "nll_loss2d_forward",
}  # fmt: skip
# The integers that these give are positions in their argument, or have bounds that somebody wrote down (grid_sample keeps its
# corners within the image by `where`); and so has what those give, of any dtype.
_POSITIONS = {
    "argmax", "argmin", "topk", "sort", "argsort", "max", "min", "median", "kthvalue", "mode", "cummax", "cummin", "searchsorted",
    "bucketize", "where", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "_low_memory_max_pool_with_offsets", "_low_memory_max_pool_offsets_to_indices",
}  # fmt: skip
_BOUNDED = {"clamp", "clamp_max", "remainder", "bitwise_and"}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def by_state(graph: fx.GraphModule) -> bool:
    """Whether an operation of an ATen graph, whose first input is the state, looks up by an index that the state decides without
    bounds."""
    made: set[Any] = set()  # of the state
    state = next((node for node in graph.graph.nodes if node.op == "placeholder"), None)
    for node in graph.graph.nodes:
        if node is state:
            made.add(node)
        if node.op != "call_function" or made.isdisjoint(node.all_input_nodes):
            continue
        name = _name(node)
        if name in _LOOKUPS and any(a in made and _is_index(a) for a in node.all_input_nodes):
            return True
        source = _name(node.args[0]) if node.target is operator.getitem else name
        if name not in _BOUNDED and not (source in _POSITIONS and _is_index(node)):
            made.add(node)
    return False


def _name(node: Any) -> str:
    """Of an ATen operator, without its overload; "" of anything else."""
    found: str = getattr(getattr(getattr(node, "target", None), "overloadpacket", None), "__name__", "")
    return found


def _is_index(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in _INTEGERS
