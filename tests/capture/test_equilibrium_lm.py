"""An equilibrium language model as it is trained: one graph, one region, the user's own kind of gradient."""

from __future__ import annotations

import copy

import pytest
import torch

from deq_compile import record_solves
from tests.helpers import compiled
from tests.models.equilibrium_lm import converged, make

SMALL = {"batch": 3, "length": 8, "d": 32, "vocabulary": 40}
BACKWARDS = {"ift": "reuse", "anderson": "reuse", "onestep": "neumann"}


@pytest.mark.parametrize("gradient", BACKWARDS)
def test_loss_and_gradients(gradient: str) -> None:
    model, batch = make(gradient, **SMALL)
    truth = converged(copy.deepcopy(model).double(), *batch)
    run, report = compiled(model)
    loss = run(*batch)
    loss.backward()
    (region,) = report.regions
    assert (region.status, region.backward) == ("solve", BACKWARDS[gradient]), str(report)
    assert report.graphs == 1
    assert not report.skipped, str(report)
    found = [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]
    for a, b in zip(found, truth, strict=True):
        assert float((a.double() - b).norm()) <= 2e-3 * float(b.norm())


@pytest.mark.parametrize("gradient", BACKWARDS)
def test_thirty_steps_of_training(gradient: str) -> None:
    """At the call's own tolerances: compiled once, what the solver tells is the solve's, and the loss is the user's."""
    model, batch = make(gradient, **SMALL)
    twin = copy.deepcopy(model)
    run, report = compiled(model, tol=None, backward_tol=None)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin)]
    for _ in range(30):
        losses = []
        for call, optimiser in zip((run, twin), optimisers, strict=True):
            with record_solves() as solves:
                losses.append(call(*batch))
                optimiser.zero_grad()
                losses[-1].backward()
                optimiser.step()
            if call is run:
                assert model.info["iters"] == solves[0].iterations_max
                assert model.info["converged"] is True
                assert 0 < model.info["rel_residual"] < 3e-4
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0.0)
    assert report.graphs == 1, str(report)
    assert [region.status for region in report.regions] == ["solve"]


def test_without_gradients() -> None:
    model, (tokens, _) = make(**SMALL)
    run, report = compiled(model)
    with torch.no_grad():
        found = run(tokens)
        torch.testing.assert_close(found, copy.deepcopy(model).double()(tokens).float(), rtol=1e-3, atol=1e-3)
    assert [region.status for region in report.regions] == ["solve"]


@pytest.mark.parametrize("batch", [2, 5])
def test_of_any_batch(batch: int) -> None:
    """What a tolerance is of does not make it depend on the batch that it was compiled for."""
    model, _ = make(**SMALL)
    run, report = compiled(model)
    for size in (3, batch, 4):  # the second has it compiled for any
        _, (tokens, targets) = make(**{**SMALL, "batch": size})
        truth = converged(copy.deepcopy(model).double(), tokens, targets)
        torch.testing.assert_close(run(tokens, targets).double(), truth[0], rtol=2e-3, atol=0.0)
    assert {region.status for region in report.regions} == {"solve"}
    assert report.graphs == 2
