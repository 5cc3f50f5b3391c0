"""What all passes together make of a small graph, as text. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from deq_compile.passes import pipeline
from deq_compile.passes.base import Pass
from deq_compile.passes.replace import Replace
from deq_compile.region.modes import Ambient
from tests.passes.graphs import captured, one_loop, text


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
    %stand_in : [num_users=1] = call_function[target=tests.passes.graphs.stand_in](args = ([%z], [%matmul], []), kwargs = {})
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


def test_every_pass_stands_in_the_table_with_its_purpose() -> None:
    """The table is the map: a pass that it does not name does not run."""
    work = pipeline.Work(captured(lambda x: x + 1, torch.ones(2)), Ambient.now())
    made = {type(step.make(work)) for steps in pipeline.ROUNDS for step in steps}
    ours = {kind for kind in subclasses(Pass) if kind.__module__.startswith("deq_compile")}
    assert made | {Replace} == ours
    for steps in pipeline.ROUNDS:
        assert all(20 < len(step.purpose) < 100 for step in steps)


def subclasses(kind: type) -> set[type]:
    direct: list[type] = kind.__subclasses__()
    return {found for child in direct for found in (child, *subclasses(child))}
