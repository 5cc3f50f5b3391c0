"""Work is counted as torch's own counter of operations counts it."""

from __future__ import annotations

import cProfile
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deq_compile import fixed_point
from deq_compile.region.counting import Counter, thin, work

W, IMAGE = torch.randn(6, 5), torch.randn(2, 4, 8, 8)
KERNEL, GROUPED = torch.randn(6, 4, 3, 3), torch.randn(6, 2, 3, 3)

CASES: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "linear": (torch.randn(3, 5), lambda z: F.linear(z, W, torch.ones(6))),
    "matmul": (torch.randn(3, 5), lambda z: z @ W.T),
    "bmm": (torch.randn(2, 3, 5), lambda z: z @ z.mT),
    "baddbmm": (torch.randn(2, 3, 5), lambda z: torch.baddbmm(torch.ones(2, 3, 3), z, z.mT)),
    "conv": (IMAGE, lambda z: F.conv2d(z, KERNEL, padding=1)),
    "strided": (IMAGE, lambda z: F.conv2d(z, KERNEL, stride=2)),
    "grouped": (IMAGE, lambda z: F.conv2d(z, GROUPED, groups=2)),
    "transposed": (IMAGE, lambda z: F.conv_transpose2d(z, torch.ones(4, 3, 3, 3), stride=2)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with its backward"])
def test_operations_are_those_of_torchs_counter(name: str, backward: bool) -> None:
    z, f = CASES[name]

    def run() -> None:
        given = z.clone().requires_grad_(backward)
        out = f(given)
        if backward:
            out.sum().backward()

    with FlopCounterMode(display=False) as theirs:
        run()
    with Counter() as mine:
        run()
    assert mine.flops == theirs.get_total_flops() > 0


def test_attention_in_one_operator_counts_as_its_two_products() -> None:
    z = torch.randn(2, 3, 7, 8)
    counts = []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        given = z.clone().requires_grad_()
        with Counter() as forward, sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(given, given, given)
        with Counter() as backward:
            out.sum().backward()
        counts.append((forward.flops, backward.flops))
    assert counts[0][0] == counts[1][0] > 0
    assert counts[1][1] <= counts[0][1] <= 1.25 * counts[1][1], "it makes one of them again"


def test_operators_count_where_they_are_many() -> None:
    z = torch.zeros(2, 3)
    assert work(lambda z: z.sin().cos(), z) == work(lambda z: z.sin(), z)

    def many(z: Tensor) -> Tensor:
        for _ in range(100):
            z = z.sin()
        return z

    assert work(many, z) > 5 * work(lambda z: z.sin(), z)
    assert thin(0, z) == 0 < thin(2, z) < thin(4, z)


def test_operators_of_others_and_of_higher_order_run_within_it() -> None:
    """Also one whose name is that of a product, with arguments that no product has."""
    from torch.library import custom_op

    @custom_op("deq_compile_counting::mm", mutates_args=())
    def mm(z: Tensor, factor: float) -> Tensor:
        return factor * z

    z = torch.randn(2, 3)
    assert work(lambda z: mm(z, 0.5), z) == work(lambda z: z.sin(), z)
    found = fixed_point(lambda z: mm(z, 0.5) + 1, z, solver="auto", tol=1e-6)
    torch.testing.assert_close(found, torch.full_like(z, 2.0), rtol=1e-4, atol=1e-4)

    def halved(z: Tensor) -> Tensor:
        return torch.cond(z.sum() > -1e9, lambda z: 0.5 * z + 1, lambda z: z - 1, (z,))

    with torch.no_grad():
        found = fixed_point(halved, z, solver="auto", tol=1e-6, batch="whole")
    torch.testing.assert_close(found, torch.full_like(z, 2.0), rtol=1e-4, atol=1e-4)


def test_a_profiler_that_python_cannot_set_again_goes_on_undisturbed() -> None:
    """cProfile's is no function: nobody counts while it is at work, and the solve is as it would be."""
    W = torch.randn(8, 8) / 8
    x = torch.randn(3, 8)
    compiled = torch.compile(lambda z: torch.tanh(z @ W), backend="eager")
    compiled(x)  # Dynamo is there

    def solved() -> Tensor:
        return fixed_point(lambda z: torch.tanh(z @ W) + x, torch.zeros_like(x), tol=1e-6)

    profile = cProfile.Profile()
    wanted = solved()
    profile.enable()
    try:
        found = solved()
        at_work: object = sys.getprofile()
    finally:
        profile.disable()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert at_work is profile or sys.version_info >= (3, 12)  # which gives profilers a place of their own
