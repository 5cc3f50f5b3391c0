"""What `Functionalise` makes of writes, as text. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from deq_compile.passes.base import PassContext
from deq_compile.passes.functionalise import Functionalise
from tests.passes.graphs import captured, text


def test_functionalise() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        torch.nn.functional.relu(y, inplace=True)
        y.mul_(3)
        return y

    gm = captured(model, torch.randn(3))
    graph = copy.deepcopy(gm.graph)
    assert Functionalise().run(graph, PassContext(lambda nodes: 3)) == 3
    assert_expected_inline(
        text(graph),
        """\
graph():
    %l_x_ : torch.Tensor [num_users=1] = placeholder[target=L_x_]
    %y : [num_users=1] = call_function[target=operator.mul](args = (%l_x_, 2), kwargs = {})
    %add : [num_users=1] = call_function[target=operator.add](args = (%y, 1), kwargs = {})
    %relu_1 : [num_users=1] = call_function[target=torch.nn.functional.relu](args = (%add,), kwargs = {inplace: False})
    %mul : [num_users=1] = call_method[target=mul](args = (%relu_1, 3), kwargs = {})
    return (mul,)""",
    )
    x = torch.randn(3)
    torch.testing.assert_close(fx.GraphModule(gm, graph)(x)[0], model(x))


def test_functionalise_keeps_the_dtype_of_the_left_operand() -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        z += y
        return z

    x, y = torch.randn(3, dtype=torch.bfloat16), torch.randn(3)
    gm = captured(model, x, y)
    graph = copy.deepcopy(gm.graph)
    assert Functionalise().run(graph, PassContext(lambda nodes: 3)) == 1
    found = fx.GraphModule(gm, graph)(x, y)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, model(x, y), rtol=0, atol=0)


def writes_input(x: Tensor) -> Tensor:
    x += 1
    return x * 2


def writes_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[0].add_(1)
    return y + 1


def read_through_an_older_view(x: Tensor) -> Tensor:
    y = x * 2
    v = y.view(-1)
    y += 1
    return y.view(-1) + v


@pytest.mark.parametrize("function", [writes_input, writes_a_view, read_through_an_older_view])
def test_functionalise_leaves_what_others_see(function: Callable[..., Any]) -> None:
    graph = captured(function, torch.randn(2, 3)).graph
    before = text(graph)
    assert Functionalise().run(graph, PassContext(lambda nodes: 3)) == 0
    assert text(graph) == before
