"""The README's table of GPU steps, from results: what was measured, on which card, with which versions, on which day."""

from __future__ import annotations

from tabulate import tabulate

from . import ways
from .goals import NOT_MEASURED, step
from .plan import PLAN
from .report import heading
from .store import Results

PROBLEMS = {
    "mlp128": "MLP, 128 × 128",
    "mlp1024": "MLP, 32 × 1024",
    "mlp1024wide": "MLP, 128 × 1024",
    "conv": "convolutions, 8 × 32 × 16²",
    "transformer": "transformer, 4 × 64 × 256",
    "lm": "language-model block, 8 × 512 × 768, bf16",
    "mdeq": "MDEQ-CIFAR, 32 × 61440",
    "flow": "DEQ-Flow, 3 × 585000",
    "graph": "implicit graph net, 2373 nodes × 256",
}
COLUMNS = {
    "eager loop": ways.EAGER, "Inductor": ways.INDUCTOR, "TorchDEQ's way": ways.PEER, "torch `while_loop`": ways.TORCH_WHILE,
    "JAX": "JAX: Broyden, jitted", "**deq**": ways.OURS, "gradient error": ways.OURS,
}  # fmt: skip


def table(results: Results) -> str:
    """A table in Markdown, milliseconds a training step; "not measured" stands wherever nothing was."""
    if not results.facts or results.rehearsed:
        return f"Training steps on a GPU: {NOT_MEASURED}."
    lines = []
    for problem in dict.fromkeys(g.name for g in PLAN if g.part == "steps"):
        cells = [PROBLEMS[problem]]
        for column, way in COLUMNS.items():
            row = step(results, problem, way)
            cells.append(
                NOT_MEASURED
                if row is None
                else f"{row['gradient_error']:.0e}"
                if column == "gradient error"
                else f"{row['ms']:.3g}"
            )
        lines.append(cells)
    head = ["ms a training step", *COLUMNS]
    return tabulate(lines, head, tablefmt="github", disable_numparse=True) + f"\n\n({heading(results)})"
