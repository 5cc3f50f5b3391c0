"""How much a body does in one evaluation, from its graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from deq_compile.region.worth import Work

from .base import ExitTest, describe, hint, value_of

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "einsum", "scaled_dot_product_attention")
_VIEWS = ("view", "reshape", "permute", "transpose", "t", "getitem", "unsqueeze", "squeeze", "expand", "detach")


def work_of(body: fx.GraphModule, tests: Sequence[ExitTest]) -> Work:
    flops = elements = 0.0
    operations = 0
    for node in body.graph.nodes:
        value = value_of(node)
        if node.op not in ("call_function", "call_method") or not isinstance(value, torch.Tensor):
            continue
        name = describe(node).rsplit(".", 1)[-1]
        if name in _VIEWS:
            continue
        operations += 1
        elements += _count(value)
        read = [v for a in node.all_input_nodes if isinstance(v := value_of(a), torch.Tensor) and v.dim()]
        if "conv" in name and len(read) > 1:
            flops += 2 * _count(value) * _count(read[1]) / max(1, hint(read[1].shape[0]))
        elif name in _PRODUCTS and read:
            flops += 2 * _count(value) * max(hint(v.shape[-1]) for v in read[:1])
    in_test = sum(node.op in ("call_function", "call_method") for test in tests for node in test.graph.graph.nodes)
    return Work(flops, elements, operations, in_test)


def _count(value: torch.Tensor) -> float:
    return float(math.prod(hint(s) for s in value.shape))
