"""Train a digit classifier, write what its solves did at each step to a CSV file, and draw that.

Needs: pip install scikit-learn matplotlib

    python examples/watch_training.py --csv solves.csv --plot solves.png
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from deq_compile.watch import CSVSink, SolveLogger, plot_solves


class Equilibrium(nn.Module):
    """z <- tanh(0.9 W z + U pixels), |W| = 1, 60 times from zero; a linear head. pixels [B, 64] -> logits [B, 10]"""

    def __init__(self, width=128, rounds=60):
        super().__init__()
        self.rounds = rounds
        self.inject, self.cell, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        spectral_norm(self.cell)

    def forward(self, pixels):
        injected = self.inject(pixels)
        weight = 0.9 * self.cell.weight  # read once: its norm is estimated anew at each reading
        z = torch.zeros_like(injected)
        for _ in range(self.rounds):
            z = torch.tanh(F.linear(z, weight, self.cell.bias) + injected)
        return self.head(z)


def main(steps=150, csv="solves.csv", plot="solves.png", every=5, options=None):
    """Train, log and draw; the share of the 360 samples left out that are classified rightly."""
    torch.manual_seed(0)
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels))
    train, test = order[:1437], order[1437:]
    model = Equilibrium()
    compiled = torch.compile(model, backend="deq", options=options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with SolveLogger(CSVSink(csv, replace=True), every=every) as log:
        for _ in range(steps):
            chosen = train[torch.randint(len(train), (64,))]
            optimizer.zero_grad()
            F.cross_entropy(compiled(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
            log.step()
    plot_solves(csv, plot)
    model.eval()
    with torch.no_grad():
        return float((compiled(pixels[test]).argmax(1) == labels[test]).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps (default %(default)s)")
    parser.add_argument("--csv", default="solves.csv", help="the file of rows (default %(default)s)")
    parser.add_argument("--plot", default="solves.png", help="the picture (default %(default)s)")
    parser.add_argument("--every", type=int, default=5, help="steps a row (default %(default)s)")
    arguments = parser.parse_args()
    print(f"accuracy {main(**vars(arguments)):.1%}; rows in {arguments.csv}, picture in {arguments.plot}")
