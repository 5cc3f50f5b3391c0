"""Under what surrounds a solve: autocast, no gradients, other dtypes; and a whole training, beside the eager loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

import deq_compile
from deq_compile import record_solves
from tests.helpers import compiled, largest_error, reference, value_and_grads
from tests.models.loops import CASES


def test_autocast_holds_in_the_backward() -> None:
    """Autograd's threads do not carry autocast; the body's products are bf16 there all the same."""
    model, x = CASES["autocast"].make()
    run, _ = compiled(model)
    with record_solves() as solves:
        found = value_and_grads(run, model, x)
    assert solves[0].status == "solve"
    assert largest_error(found, value_and_grads(model, model, x)) < 3e-2


def test_autocast_around_the_call() -> None:
    model, x = CASES["linear"].make()
    run, report = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(x).dtype == model(x).dtype
        torch.testing.assert_close(run(x), model(x), rtol=2e-2, atol=2e-2)
    assert len(report.regions) == 1


def test_package_exports() -> None:
    assert all(hasattr(deq_compile, name) for name in deq_compile.__all__)


def test_training_follows_the_eager_loop() -> None:
    """Ten steps of Adam through the region and through the user's loop end at the same weights."""
    trained = []
    for use in (True, False):
        model, _ = CASES["linear"].make()
        run = compiled(model)[0] if use else model
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(3)
        losses = []
        for _ in range(10):
            x = torch.randn(8, 16, generator=generator)
            loss = ((run(x) - x.roll(1, 1)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trained.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, weights), (expected_losses, expected) = trained
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode: Callable[[], AbstractContextManager[None]]) -> None:
    """No gradients: no steps are stored for a backward that never comes."""
    model, x = CASES["linear"].make()
    run, report = compiled(model)
    with mode(), record_solves() as solves:
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
        run(x)
    assert report.regions[0].backward == "-"
    assert [s.bytes for s in solves] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Low precision stops at its floor, and is compared as its precision allows."""
    model, x = CASES["linear"].make(dtype)
    run, report = compiled(model)
    found, expected = value_and_grads(run, model, x), reference(model, x)
    assert report.regions[0].status == "solve"
    assert run(x).dtype == dtype
    bound = 1e-4 if dtype == torch.float64 else 20 * torch.finfo(dtype).eps
    assert largest_error(found, expected) < bound
