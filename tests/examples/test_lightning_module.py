"""PyTorch Lightning: what `docs/trainers.md` says works and what it says does not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from deq_compile import deq_compile, record_solves
from tests.examples.loading import example

# Lightning warns of few workers, of no logger, and of torch's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("lightning.pytorch", reason="the extra `trainers` is not installed")
OPTIONS = {"inner": "eager"}


def test_it_learns_by_solving(tmp_path: Path) -> None:
    metrics, solves = example("lightning_module").main(csv=tmp_path / "solves.csv", options=OPTIONS)
    trained = [solve for solve in solves if solve.vjps is not None]
    assert metrics["accuracy"] > 0.9
    assert len(trained) == 150
    assert {solve.status for solve in solves} == {"solve"}
    assert sum(solve.iterations for solve in trained) < 150 * 15  # less than a third of the loop's
    assert len((tmp_path / "solves.csv").read_text().splitlines()) == 1 + 15


def test_mixed_precision() -> None:
    _, solves = example("lightning_module").main(steps=4, precision="bf16-mixed", options=OPTIONS)
    assert len([solve for solve in solves if solve.vjps is not None]) == 4


@pytest.mark.parametrize("backend", ["eager", "deq"])
def test_a_whole_module_that_logs_is_traced_by_no_backend(backend: str) -> None:
    module = example("lightning_module")
    whole = torch.compile(module.Classifier(OPTIONS), backend=backend)
    with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError, match="has no attribute '__dict__'"):
        fit(module, whole)


def test_the_decorated_lightning_module_is_not_what_lightning_calls() -> None:
    """It calls `training_step`, which no `forward` goes through: nothing is solved, and nothing is broken."""
    module = example("lightning_module")
    whole = module.Classifier(OPTIONS)
    whole.net = module.Equilibrium()
    with record_solves() as solves:
        fit(module, deq_compile(whole, **OPTIONS))
    assert not solves


def fit(module: ModuleType, model: Any) -> None:
    """Two steps."""
    settings: dict[str, Any] = {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    module.pl.Trainer(**settings, **quiet).fit(model, module.digits()[0])
