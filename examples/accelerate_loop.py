"""An equilibrium model in a loop of accelerate's: `deq_compile(model)` before `accelerator.prepare`.

Needs: pip install accelerate scikit-learn

    python examples/accelerate_loop.py --precision bf16
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from deq_compile import deq_compile, record_solves


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


def digits():
    """Loaders of 1,437 samples for training and 360 for evaluation: pixels [B, 64] in 0 to 1, labels [B]."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    shuffled = torch.Generator().manual_seed(1)
    return (
        DataLoader(TensorDataset(pixels[train], labels[train]), 64, shuffle=True, drop_last=True, generator=shuffled),
        DataLoader(TensorDataset(pixels[test], labels[test]), 60),
    )


def main(epochs=7, precision="no", options=None):
    """Train on all processes; accuracy on the evaluation samples of all, and the records of this process's solves."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    model = deq_compile(Equilibrium(), **(options or {}))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, *digits())
    with record_solves() as solves:
        for _ in range(epochs):
            for pixels, labels in train:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(pixels), labels))
                optimizer.step()
        right = []
        with torch.no_grad():
            for pixels, labels in test:
                guess, labels = accelerator.gather_for_metrics((model(pixels).argmax(1), labels))
                right.append(guess == labels)
    accelerator.end_training()
    return float(torch.cat(right).float().mean()), solves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=7, help="passes over the training samples (default %(default)s)")
    parser.add_argument("--precision", default="no", help="accelerate's mixed precision: no, fp16, bf16 (default %(default)s)")
    accuracy, solves = main(**vars(parser.parse_args()))
    trained = [solve for solve in solves if solve.vjps is not None]
    mean = sum(solve.iterations for solve in trained) / len(trained)
    print(f"accuracy {accuracy:.1%}; {mean:.1f} iterations a solve, in place of 50")
