"""A loop that its cap ends, and not its test, gives the user's own iterate: the cap counts, however it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import compiled

CAP = 17


def f(z: Tensor, x: Tensor) -> Tensor:
    return 0.97 * z + x  # 17 iterations are far from its fixed point


def while_gap_and_count(x: Tensor) -> Tensor:
    z, gap, k = torch.zeros_like(x), torch.tensor(1.0), 0
    while gap > 1e-6 and k < CAP:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
    return z


def while_count_and_gap(x: Tensor) -> Tensor:
    z, gap, k = torch.zeros_like(x), torch.tensor(1.0), 0
    while k < CAP and gap > 1e-6:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
    return z


def count_first(x: Tensor) -> Tensor:
    z, k = torch.zeros_like(x), 0
    while True:
        if k >= CAP:
            break
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
        if gap < 1e-6:
            break
    return z


def count_last(x: Tensor) -> Tensor:
    z, k = torch.zeros_like(x), 0
    while True:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
        if gap < 1e-6:
            break
        if k >= CAP:
            break
    return z


def either(x: Tensor) -> Tensor:
    z, k = torch.zeros_like(x), 0
    while True:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
        if k >= CAP or gap < 1e-6:
            break
    return z


def downwards(x: Tensor) -> Tensor:
    z, left = torch.zeros_like(x), CAP
    while left > 0:
        new = f(z, x)
        gap, z, left = (new - z).norm(), new, left - 1
        if gap < 1e-6:
            break
    return z


def in_a_range(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(CAP):
        new = f(z, x)
        gap, z = (new - z).norm(), new
        if gap < 1e-6:
            break
    return z


def before_the_last_step(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(CAP):
        new = f(z, x)
        if (new - z).norm() < 1e-6:
            break
        z = new
    return z


def equal_to_the_cap(x: Tensor) -> Tensor:
    z, gap, k = torch.zeros_like(x), torch.tensor(1.0), 0
    while gap > 1e-6:
        old, z = z, f(z, x)
        gap, k = (z - old).norm() / z.norm(), k + 1
        if k == CAP:
            break
    return z


def few(x: Tensor) -> Tensor:
    z, gap, k = torch.zeros_like(x), torch.tensor(1.0), 0
    while gap > 1e-6 and k < 7:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
    return z


LOOPS = [
    while_gap_and_count, while_count_and_gap, count_first, count_last, either, downwards, in_a_range, before_the_last_step,
    equal_to_the_cap, few,
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_that_its_cap_ends_gives_its_own_iterate(loop: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run, report = compiled(loop, tol=None, inner="eager")
    for _ in range(4):
        torch.testing.assert_close(run(x), loop(x))
    assert [region.status for region in report.regions] in ([], ["kept"])


def over_a_list(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in [0, 1, 2, 3, 4, 5, 6]:
        new = f(z, x)
        gap, z = (new - z).norm(), new
        if gap < 1e-6:
            break
    return z


def by_doubling(x: Tensor) -> Tensor:
    z, k = torch.zeros_like(x), 1
    while k < 2**14:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, 2 * k
        if gap < 1e-6:
            break
    return z


def by_truth(x: Tensor) -> Tensor:
    z, left = torch.zeros_like(x), 12
    while left:
        new = f(z, x)
        gap, z, left = (new - z).norm(), new, left - 1
        if gap < 1e-6:
            break
    return z


def by_a_float(x: Tensor) -> Tensor:
    z, t = torch.zeros_like(x), 0.0
    while t < 1.0:
        new = f(z, x)
        gap, z, t = (new - z).norm(), new, t + 1 / 16
        if gap < 1e-6:
            break
    return z


def in_a_chain(x: Tensor) -> Tensor:
    z, gap, k = torch.zeros_like(x), torch.tensor(1.0), 0
    while gap > 1e-6 and 0 <= k < CAP:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
    return z


def by_an_argument(x: Tensor, cap: int = 13) -> Tensor:
    z, gap, k = torch.zeros_like(x), torch.tensor(1.0), 0
    while gap > 1e-6 and k < cap:
        new = f(z, x)
        gap, z, k = (new - z).norm(), new, k + 1
    return z


HIDDEN = [over_a_list, by_doubling, by_truth, by_a_float, in_a_chain]


@pytest.mark.parametrize("loop", HIDDEN, ids=lambda loop: loop.__name__)
def test_an_exit_that_cannot_be_counted_is_left_alone(loop: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run, report = compiled(loop, fullgraph=False, tol=None, inner="eager")
    for _ in range(3):
        torch.testing.assert_close(run(x), loop(x))
    assert [region.status for region in report.regions] in ([], ["kept"])
    assert report.regions or "HIDDEN_CAP" in [skipped.reason.name for skipped in report.skipped]


def test_a_cap_that_changes() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run, _ = compiled(by_an_argument, fullgraph=False, tol=None, inner="eager")
    for cap in (13, 7, 12, 9, 40):
        torch.testing.assert_close(run(x, cap), by_an_argument(x, cap))


def test_a_loop_without_a_cap_runs_until_its_test() -> None:
    def loop(x: Tensor) -> Tensor:
        z, gap = torch.zeros_like(x), torch.tensor(1.0)
        while gap > 1e-3:
            new = 0.998 * z + x
            gap, z = (new - z).abs().max(), new
        return z

    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run, _ = compiled(loop, tol=None, inner="eager")
    for _ in range(3):
        torch.testing.assert_close(run(x), loop(x), rtol=2e-3, atol=1e-3)
