"""A model of TorchDEQ's is found, and its gradients are those of its own library."""

from __future__ import annotations

import pytest
import torch

from tests.examples.loading import example

pytest.importorskip("torchdeq")


def test_it_is_solved_with_the_librarys_own_accuracy() -> None:
    found = example("torchdeq_model").main(width=64, repeats=1, options={"inner": "eager"})
    assert [(region.kind, region.status) for region in found["report"].regions] == [("TorchDEQ broyden_solver", "solve")]
    assert not found["report"].skipped
    assert found["deq_error"] < 1e-3
    assert found["torchdeq_error"] < 1e-3
    assert min(found["deq_seconds"], found["torchdeq_seconds"]) > 0


def test_the_error_would_show_a_solve_that_stops_early() -> None:
    module = example("torchdeq_model")
    model, x = module.Model(64, f_tol=1e-10).double(), torch.randn(8, 64, dtype=torch.float64)
    early = module.Model(64, f_tol=0.5).double()
    early.load_state_dict(model.state_dict())
    assert module.error(module.gradients(early, early, x), module.gradients(model, model, x)) > 1e-2
