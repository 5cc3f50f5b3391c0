"""An equilibrium model in PyTorch Lightning: compile the module inside of the LightningModule.

The LightningModule itself is left to Python, since its `self.log` cannot be traced. Needs: pip install lightning scikit-learn

    python examples/lightning_module.py --precision bf16-mixed --csv solves.csv
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from deq_compile import deq_compile, record_solves
from deq_compile.watch import LightningWatch


class Equilibrium(nn.Module):
    """z <- tanh(0.7 W z + U pixels), |W| = 1, 50 times from zero; a linear head. pixels [B, 64] -> logits [B, 10]"""

    def __init__(self, width=64, rounds=50):
        super().__init__()
        self.rounds = rounds
        self.inject, self.cell, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        spectral_norm(self.cell)

    def forward(self, pixels):
        injected = self.inject(pixels)
        weight = 0.7 * self.cell.weight  # read once: its norm is estimated anew at each reading
        z = torch.zeros_like(injected)
        for _ in range(self.rounds):
            z = torch.tanh(F.linear(z, weight, self.cell.bias) + injected)
        return self.head(z)


class Classifier(pl.LightningModule):
    """A LightningModule as any other; what is compiled is its inner module."""

    def __init__(self, options=None):
        super().__init__()
        self.net = deq_compile(Equilibrium(), **(options or {}))

    def training_step(self, batch, index):
        pixels, labels = batch
        loss = F.cross_entropy(self.net(pixels), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        pixels, labels = batch
        self.log("accuracy", (self.net(pixels).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def digits():
    """Loaders of 1,437 samples for training and 360 for validation: pixels [B, 64] in 0 to 1, labels [B]."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    shuffled = torch.Generator().manual_seed(1)
    return (
        DataLoader(TensorDataset(pixels[train], labels[train]), 64, shuffle=True, drop_last=True, generator=shuffled),
        DataLoader(TensorDataset(pixels[test], labels[test]), len(test)),
    )


def main(steps=150, precision="32-true", csv=None, options=None):
    """Train; the metrics that were logged, and the records of all solves."""
    pl.seed_everything(0, verbose=False)
    train, test = digits()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        precision=precision,
        callbacks=[LightningWatch(csv, every=10)] if csv else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(options)
    with record_solves() as solves:
        trainer.fit(module, train)
        trainer.validate(module, test, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, solves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps (default %(default)s)")
    parser.add_argument("--precision", default="32-true", help="Lightning's, for instance bf16-mixed (default %(default)s)")
    parser.add_argument("--csv", help="write there what the solves did")
    metrics, solves = main(**vars(parser.parse_args()))
    trained = [solve for solve in solves if solve.vjps is not None]
    mean = sum(solve.iterations for solve in trained) / len(trained)
    print(f"accuracy {metrics['accuracy']:.1%}; {mean:.1f} iterations a solve, in place of 50")
