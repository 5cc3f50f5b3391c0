"""Weights to measure at: a few hundred steps on this project's own notes, byte by byte."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bench.tables.runs import ROOT
from tests.models.equilibrium_lm import EquilibriumLM

BATCH, LENGTH, BYTES = 8, 64, 256
TEXTS = ("README.md", "NOTES.md")


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """So many batches of bytes with their successors, drawn from one seed."""
    text = b"".join((ROOT / name).read_bytes() for name in TEXTS)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(data) - LENGTH, (count, BATCH), generator=generator).tolist()
    rows = [torch.stack([data[s : s + LENGTH + 1] for s in row]) for row in starts]
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def fresh(width: int, gradient: str, gate: float) -> EquilibriumLM:
    """gate: its value before the sigmoid, in every channel: how much of the state goes into the next one."""
    torch.manual_seed(0)
    model = EquilibriumLM(BYTES, width, 4, LENGTH, gradient)
    torch.nn.init.constant_(model.block.gate, gate)
    return model


def trained(width: int, steps: int, gate: float) -> dict[str, Tensor]:
    """Weights after so many steps of AdamW with the user's one-step gradient, in eager mode."""
    model = fresh(width, "onestep", gate)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = torch.zeros(())
    for tokens, targets in batches(steps + 1)[1:]:
        loss = model(tokens, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"  width {width}, gate {gate}: loss {float(loss):.2f} after {steps} steps; {model.info}", file=sys.stderr, flush=True)
    return model.state_dict()
