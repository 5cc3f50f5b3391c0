"""What each pass makes of a small graph, as text. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from deq_compile.passes.ambient import ambient_at
from deq_compile.passes.base import Loop, PassContext
from deq_compile.passes.extract import Extract
from deq_compile.passes.find_loops import FindLoops, deduplicate_constants
from deq_compile.passes.functionalise import Functionalise
from deq_compile.passes.hoist import Hoist
from deq_compile.passes.judge import Judge
from deq_compile.passes.replace import Replace
from deq_compile.region.modes import Ambient
from deq_compile.report import Reason


def stand_in(states: Any, operands: Any, sizes: Any) -> list[Tensor]:
    """What Replace puts in the place of a loop here."""
    raise NotImplementedError


def captured(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    found = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def text(graph: fx.Graph) -> str:
    return str(graph).strip()


def run_passes(gm: fx.GraphModule, until: str = "replace") -> tuple[fx.Graph, PassContext]:
    graph, context = copy.deepcopy(gm.graph), PassContext(lambda nodes: 3)
    deduplicate_constants(graph)
    passes = [Functionalise(), FindLoops(), Judge(Ambient.now()), Hoist(), Extract(gm)]
    passes.append(Replace(lambda loop: (stand_in, (list(loop.initial), list(loop.operands), list(loop.sizes)))))
    for step in passes:
        step(graph, context)
        if step.name == until:
            break
    return graph, context


def one_loop(function: Callable[..., Any], *inputs: Any, until: str = "replace") -> tuple[fx.Graph, Loop]:
    graph, context = run_passes(captured(function, *inputs), until)
    (loop,) = context.loops
    return graph, loop


def test_the_whole_way() -> None:
    """One loop of three becomes one node; the injection is hoisted; the body is a graph of its own."""
    u = torch.randn(4, 4)

    def model(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            z = torch.tanh(z + x @ u)
        return z.sum()

    graph, loop = one_loop(model, torch.randn(2, 4))
    assert (loop.count, loop.period, len(loop.hoisted_offsets)) == (4, 3, 1)
    assert_expected_inline(
        text(graph),
        """\
graph():
    %l_x_ : torch.Tensor [num_users=2] = placeholder[target=L_x_]
    %l_u_ : torch.Tensor [num_users=1] = placeholder[target=L_u_]
    %z : [num_users=1] = call_function[target=torch.zeros_like](args = (%l_x_,), kwargs = {})
    %matmul : [num_users=1] = call_function[target=operator.matmul](args = (%l_x_, %l_u_), kwargs = {})
    %stand_in : [num_users=1] = call_function[target=tests.passes.test_golden.stand_in](args = ([%z], [%matmul], []), kwargs = {})
    %getitem : [num_users=1] = call_function[target=operator.getitem](args = (%stand_in, 0), kwargs = {})
    %sum_1 : [num_users=1] = call_method[target=sum](args = (%getitem,), kwargs = {})
    return (sum_1,)""",
    )
    assert loop.body is not None
    assert_expected_inline(
        text(loop.body.graph),
        """\
graph():
    %z0 : [num_users=1] = placeholder[target=z0]
    %a0 : [num_users=1] = placeholder[target=a0]
    %add_3 : [num_users=1] = call_function[target=operator.add](args = (%z0, %a0), kwargs = {})
    %z_4 : [num_users=1] = call_function[target=torch.tanh](args = (%add_3,), kwargs = {})
    return (z_4,)""",
    )


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


def test_period_of_two_like_halves() -> None:
    """Two sublayers of one shape but other weights: the body is both of them."""
    a, b = torch.randn(4, 4), torch.randn(4, 4)

    def model(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(x @ a)
            x = torch.tanh(x @ b)
        return x

    _, loop = one_loop(model, torch.randn(2, 4), until="find_loops")
    assert (loop.count, loop.period) == (4, 4)


def test_rotation_carries_the_least() -> None:
    """The loop is cut where one tensor crosses, not three."""

    def model(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            a, b = torch.sin(z), torch.cos(z)
            z = a * b + x
        return z

    _, loop = one_loop(model, torch.randn(2, 4), until="find_loops")
    assert len(loop.carried) == 1
    assert (loop.count, loop.period) == (4, 4)


def test_last_segment_is_peeled_where_its_inside_is_read() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.zeros_like(x)
        for _ in range(5):
            new = torch.tanh(z * 0.5 + x)
            residual = (new - z).norm()
            z = new
        return z, residual

    graph, loop = one_loop(model, torch.randn(2, 4))
    assert loop.count == 4
    assert "norm" in text(graph)


def test_hoisting_keeps_autocast_around_hoisted_work() -> None:
    w, u = torch.randn(4, 4), torch.randn(4, 4)

    def model(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = torch.tanh(z @ w + x @ u).float()
        return z

    graph, loop = one_loop(model, torch.randn(2, 4))
    assert len(loop.hoisted_offsets) == 1
    names = [getattr(n.target, "__name__", n.target) for n in graph.nodes if n.op.startswith("call")]
    enter, leave = names.index("_enter_autocast"), names.index("_exit_autocast")
    assert enter < names.index("matmul") < leave
    assert "_enter_autocast" in text(loop.body.graph)  # type: ignore[union-attr]


def test_ambient_modes() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.sin()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = x.cos()
        return x.tan()

    graph = captured(model, torch.randn(2)).graph
    modes = {n.target: ambient_at(graph, n, Ambient.now()) for n in graph.nodes if n.op == "call_method"}
    off, on = torch.get_autocast_dtype("cpu"), torch.bfloat16
    assert modes["sin"].grad is False
    assert modes["sin"].autocast[0] == ("cpu", False, off)
    assert modes["cos"].autocast[0] == ("cpu", True, on)
    assert modes["tan"] == Ambient.now()


def test_refusals_name_operation_and_line() -> None:
    def model(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(x) + 0.1 * torch.rand_like(x)
        return x

    _, context = run_passes(captured(model, torch.randn(2, 4)))
    (skipped,) = context.report.skipped
    assert skipped.reason is Reason.RANDOM
    assert skipped.detail == "rand_like"
    assert skipped.location.line == model.__code__.co_firstlineno + 2
    assert context.loops == []


def integer_state(x: Tensor) -> Tensor:
    for _ in range(4):
        x = torch.bitwise_not(x) * 2
    return x


def sizes_that_grow(x: Tensor) -> Tensor:
    for _ in range(6):
        x = torch.cat([x, x])
    return x


@pytest.mark.parametrize(
    ("function", "reason", "dtype"),
    [(integer_state, Reason.NOT_FLOATING, torch.int64), (sizes_that_grow, Reason.DRIFT, torch.float32)],
)
def test_states_that_are_none(function: Callable[..., Any], reason: Reason, dtype: torch.dtype) -> None:
    _, context = run_passes(captured(function, torch.ones(3, dtype=dtype)))
    assert context.loops == []
    assert [s.reason for s in context.report.skipped] == [reason]


def test_find_is_fast() -> None:
    """2,400 nodes in well under a second (29 ms where it was measured)."""
    weights = [torch.randn(4, 4) for _ in range(12)]

    def model(x: Tensor) -> Tensor:
        for _ in range(100):
            for w in weights:
                x = torch.tanh(x @ w)
        return x

    gm = captured(model, torch.randn(2, 4))
    context = PassContext(lambda nodes: 3)
    FindLoops()(gm.graph, context)
    (loop,) = context.loops
    assert (loop.count, loop.period) == (100, 24)
    assert context.report.seconds["find_loops"] < 2.0
