"""Operators of a body's graph that are computed by others, where Inductor's own code for them is slow.

On a CPU Inductor calls Sleef's tanh, a third of the time of a small body: it works in pairs of floats to be within a unit in the
last place. Ours is that of the Cephes library (Moshier 1989, tanhf.c): within 1.4 units in the last place, odd, 1 at infinity.
The graph is changed when it has been split into a forward and its products: what is saved between them stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Op = Callable[..., Any]

SMALL = 0.625  # up to there by a polynomial in x^2; beyond, by the exponential
COEFFICIENTS = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def tanh(op: Op, x: Any) -> Any:
    """tanh(x) in operators that are called through `op`."""
    size = op(aten.abs.default, x)
    square = op(aten.mul.Tensor, size, size)
    sum_ = op(aten.add.Tensor, op(aten.mul.Tensor, square, COEFFICIENTS[0]), COEFFICIENTS[1])
    for coefficient in COEFFICIENTS[2:]:
        sum_ = op(aten.add.Tensor, op(aten.mul.Tensor, sum_, square), coefficient)
    near = op(aten.add.Tensor, op(aten.mul.Tensor, op(aten.mul.Tensor, sum_, square), size), size)
    grown = op(aten.add.Tensor, op(aten.exp.default, op(aten.add.Tensor, size, size)), 1.0)
    far = op(aten.sub.Tensor, 1.0, op(aten.mul.Tensor, op(aten.reciprocal.default, grown), 2.0))
    return op(aten.copysign.Tensor, op(aten.where.self, op(aten.lt.Scalar, size, SMALL), near, far), x)


def for_inductor(graph: fx.GraphModule) -> None:
    """Rewrite a traced graph in place, where its tensors are float32 and on the CPU."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.tanh.default:
            continue
        given = node.args[0].meta.get("val")
        if isinstance(given, Tensor) and given.dtype == torch.float32 and given.device.type == "cpu":
            _replace(graph.graph, node)


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    def op(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return made

    with graph.inserting_before(node):
        node.replace_all_uses_with(tanh(op, node.args[0]))
    graph.erase_node(node)
