"""The logger inside of PyTorch Lightning and of Hugging Face's Trainer. Both are in the extra `trainers`."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deq_compile.watch
from deq_compile import deq_compile as compile_it

GENERATOR = torch.Generator().manual_seed(0)
DATA = [{"pixels": torch.randn(16, generator=GENERATOR), "labels": n % 4} for n in range(32)]


class Model(nn.Module):
    """A loop, and a loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        nn.init.orthogonal_(self.cell.weight, gain=0.7)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        z = torch.zeros_like(pixels)
        for _ in range(40):
            z = torch.tanh(self.cell(z) + pixels)
        logits = self.head(z)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def read(path: Path) -> list[tuple[int, int, str]]:
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert all(float(row["iterations"]) < 40 and float(row["adjoint_residual"]) < 0.1 for row in rows)
    return [(int(row["step"]), int(row["solves"]), row["verdict"]) for row in rows]


def listening() -> bool:
    from deq_compile.region import records

    return records.recording()


def test_the_trainer(tmp_path: Path) -> None:
    """Two batches of four a step; an evaluation after every step is not counted."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from deq_compile.watch import TrainerWatch

    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    watch = TrainerWatch(tmp_path / "solves.csv")
    model = compile_it(Model(), inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        transformers.Trainer(model, settings, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[watch]).train()
    assert read(tmp_path / "solves.csv") == [(1, 2, "solve"), (2, 2, "solve"), (3, 2, "solve")]
    assert not listening()
    with pytest.raises(ValueError, match="expected a sink"):
        TrainerWatch()


@pytest.fixture
def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        return pytest.importorskip("lightning.pytorch")


def fit(lightning: Any, tmp_path: Path, watch: Any, **settings: Any) -> None:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = compile_it(Model(), inner="eager")

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = self.model(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.log("val", self.model(**batch)["loss"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    defaults = {
        "max_steps": 3, "accumulate_grad_batches": 2, "val_check_interval": 2, "accelerator": "cpu", "callbacks": [watch],
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False,
        "default_root_dir": tmp_path, "log_every_n_steps": 1,
    }  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(DATA, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: few workers, few batches
        lightning.Trainer(**{**defaults, **settings}).fit(Module(), loader, loader)


def test_lightning(lightning: Any, tmp_path: Path) -> None:
    """Two batches of four a step; validations, the first before all training, are not counted."""
    from deq_compile.watch import LightningWatch

    fit(lightning, tmp_path, LightningWatch(tmp_path / "solves.csv"))
    assert read(tmp_path / "solves.csv") == [(1, 2, "solve"), (2, 2, "solve"), (3, 2, "solve")]
    assert not listening()


def test_lightning_without_a_sink_tells_its_own_loggers(lightning: Any, tmp_path: Path) -> None:
    from deq_compile.watch import LightningWatch

    logger = lightning.loggers.CSVLogger(tmp_path, name="run", version="0")
    fit(lightning, tmp_path, LightningWatch(every=3), logger=logger)
    logger.save()
    written = (tmp_path / "run" / "0" / "metrics.csv").read_text().splitlines()
    (line,) = [line for line in csv.DictReader(written) if _told(line)]
    assert 0 < _told(line)["iterations"] < 40
    assert _told(line)["solves"] == 6


def _told(line: dict[str, str]) -> dict[str, float]:
    return {name.rsplit("/", 1)[1]: float(value) for name, value in line.items() if name.startswith("deq/") and value}


def test_lightning_that_is_interrupted_stops_listening(lightning: Any, tmp_path: Path) -> None:
    from deq_compile.watch import LightningWatch

    class Breaks(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise RuntimeError("the power went")

    watch = LightningWatch(tmp_path / "solves.csv", every=100)
    with pytest.raises(RuntimeError, match="the power went"):
        fit(lightning, tmp_path, watch, callbacks=[watch, Breaks()])
    assert not listening()
    assert read(tmp_path / "solves.csv") == [(1, 2, "solve")]  # of a step that was finished


def test_neither_is_needed_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name, module in (("LightningWatch", "lightning.pytorch"), ("TrainerWatch", "transformers")):
        for known in ("deq_compile.watch.lightning", "deq_compile.watch.trainer", "pytorch_lightning"):
            monkeypatch.delitem(sys.modules, known, raising=False)
        monkeypatch.delitem(vars(deq_compile.watch), name, raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{name}: expected {module} to be importable, .* Fix: pip install"):
            getattr(deq_compile.watch, name)
