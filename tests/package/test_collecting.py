"""Full collections are rarer while code is compiled, and as the user has set them afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from deq_compile.collecting import RARER, seldom
from deq_compile.testing import deq


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_the_users_thresholds_come_back() -> None:
    gc.set_threshold(500, 7, 9)
    with seldom():
        assert gc.get_threshold() == (500, 7, 9 * RARER)
        with seldom():
            assert gc.get_threshold() == (500, 7, 9 * RARER * RARER)
    assert gc.get_threshold() == (500, 7, 9)
    with pytest.raises(ZeroDivisionError), seldom():
        1 / 0  # noqa: B018
    assert gc.get_threshold() == (500, 7, 9)


def test_what_somebody_sets_meanwhile_stays() -> None:
    with seldom():
        gc.set_threshold(300)
    assert gc.get_threshold()[0] == 300


def test_compiled_code_leaves_them_alone() -> None:
    gc.set_threshold(800, 11, 12)
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            z = torch.tanh(z @ W + x)
        return z

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled = deq(gm, inputs, options={"inner": "eager"})
        seen.append(gc.get_threshold())
        return compiled

    torch.compile(model, backend=backend)(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert seen == [(800, 11, 12)]
    assert gc.get_threshold() == (800, 11, 12)
