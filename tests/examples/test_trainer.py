"""Hugging Face's Trainer: what `docs/trainers.md` says works and what it says does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deq_compile import deq_compile, record_solves
from tests.examples.loading import example

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of libraries
for name in ("transformers", "accelerate"):
    pytest.importorskip(name, reason="the extra `trainers` is not installed")
OPTIONS = {"inner": "eager"}


def test_it_learns_by_solving(tmp_path: Path) -> None:
    trainer = example("trainer")
    metrics, solves = trainer.main(csv=tmp_path / "solves.csv", options=OPTIONS)
    trained = [solve for solve in solves if solve.vjps is not None]
    assert metrics["eval_accuracy"] > 0.9
    assert len(trained) == 150
    assert {solve.status for solve in solves} == {"solve"}
    assert sum(solve.iterations for solve in trained) < 150 * 15  # less than a third of the loop's
    assert len((tmp_path / "solves.csv").read_text().splitlines()) == 1 + 15


def fit(tmp_path: Path, wrap: Callable[[nn.Module], Any], **settings: Any) -> nn.Module:
    """Four steps of the example's model; the model itself, trained."""
    trainer = example("trainer")
    torch.manual_seed(0)
    model = trainer.EquilibriumClassifier()
    arguments = trainer.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=32, use_cpu=True, logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer.Trainer(wrap(model), arguments, train_dataset=trainer.digits()[0]).train()
    return model


def test_compiled_and_eager_train_alike(tmp_path: Path) -> None:
    plain = fit(tmp_path, lambda model: model)
    with record_solves() as solves:
        solved = fit(tmp_path, lambda model: deq_compile(model, tol=1e-6, backward_tol=1e-6, **OPTIONS))
    assert [solve.status for solve in solves] == ["solve"] * 4
    for a, b in zip(solved.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_in_bf16(tmp_path: Path) -> None:
    with record_solves() as solves:
        fit(tmp_path, lambda model: deq_compile(model, **OPTIONS), bf16=True)
    assert len(solves) == 4
    assert all(solve.vjps is not None for solve in solves)


def test_the_name_of_the_backend_is_refused_by_accelerate(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'DEQ' is not a valid DynamoBackend"):
        fit(tmp_path, lambda model: model, torch_compile_backend="deq")


def test_a_compiled_module_has_lost_its_signature(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The batch received was empty"):
        fit(tmp_path, lambda model: torch.compile(model, backend="deq", options=OPTIONS))
