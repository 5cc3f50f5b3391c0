"""``python -m bench sizes``: batches of many sizes and sequences of many lengths: compilations, steady steps, memory.

Each problem's training step runs once for every size, in random order; then it runs at a few of those sizes, in turns with the
same model compiled for that size alone. One thread, process CPU time. The ratio is the median of the turns' own ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from bench import machine
from bench.tables.cli import header

WIDTH = 64
Step = Callable[[tuple[int, ...]], None]


class Layer(nn.Module):
    """An implicit layer: dense with LayerNorm on (B, 64), or with attention on (B, T, 64)."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.inject, self.lin, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        nn.init.orthogonal_(self.lin.weight, gain=0.4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        z = torch.zeros_like(u)
        for _ in range(30):
            h = self.lin(z)
            if self.attention:
                h = F.scaled_dot_product_attention(h[:, None], h[:, None], z[:, None])[:, 0]
            z = self.norm(0.5 * h + u)
        return z


def shapes_of(problem: str) -> list[tuple[int, ...]]:
    """300 batch sizes, or 50 lengths with batches of 2 to 16."""
    rng = random.Random(0)
    if problem == "batches":
        return [(batch, WIDTH) for batch in rng.sample(range(8, 400), 300)]
    return [(rng.randint(2, 16), length, WIDTH) for length in rng.sample(range(8, 128), 50)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=40, help="timed turns a size (default %(default)s)")
    parser.add_argument("--compared", type=int, default=4, help="sizes that are compared (default %(default)s)")
    parser.add_argument("--inner", default="inductor", help="the backend of the rest (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything there")


def step_of(model: nn.Module, inner: str, number: int = 0, **given: Any) -> Step:
    """A training step; `number` keeps its compiled bodies apart from those of other steps."""
    patches = {"kernel_name_max_ops": 10 + number} if inner == "inductor" else {}  # a cosmetic setting
    options: Any = {"inner": inner, "inductor": patches}
    run = torch.compile(model, backend="deq", options=options, **given)

    def step(shape: tuple[int, ...]) -> None:
        model.zero_grad()
        out = run(torch.randn(shape))
        (out * out.detach().cos()).mean().backward()

    return step


def taken(step: Step, shape: tuple[int, ...]) -> float:
    step(shape)
    begun = time.process_time()
    step(shape)
    return time.process_time() - begun


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(problem: str, args: argparse.Namespace) -> dict[str, Any]:
    from deq_compile.testing import Program

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, shapes = Layer(problem == "lengths"), shapes_of(problem)
    compiled: list[str] = []
    original = Program._compile_joint

    def counting(self: Program, *given: Any) -> Any:
        compiled.append(type(self).__name__)
        return original(self, *given)

    Program._compile_joint = counting  # type: ignore[method-assign, assignment]
    step, peaks = step_of(model, args.inner), []
    begun = time.process_time()
    for shape in shapes:
        step(shape)
        peaks.append(peak_mib())
    first_round_s = time.process_time() - begun
    count, ratios = len(compiled), []
    for number, shape in enumerate(random.Random(1).sample(shapes, args.compared), 1):
        alone = step_of(model, args.inner, number, dynamic=False)
        for _ in range(20):
            alone(shape), step(shape)
        ratios.append([taken(step, shape) / taken(alone, shape) for _ in range(args.turns)])
    Program._compile_joint = original  # type: ignore[method-assign]
    row = {"problem": problem, "sizes": len(shapes), "body_compilations": count, "first_round_s": first_round_s}
    row |= {"peak_mib_half_way": peaks[len(peaks) // 2], "peak_mib": peaks[-1]}
    return row | {
        "ratios": [statistics.median(found) for found in ratios],
        "ratio": statistics.median([r for found in ratios for r in found]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["problem"], row["sizes"], row["body_compilations"], f"{row['first_round_s']:.1f}", f"{row['ratio']:.3f}",
            f"{min(row['ratios']):.3f}–{max(row['ratios']):.3f}", f"{row['peak_mib_half_way']:.0f} → {row['peak_mib']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["problem", "sizes", "body compilations", "first round (s)", "step / static", "by size", "peak memory (MiB)"]
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    head = header(argparse.Namespace(threads=1, repeats=args.turns))
    head["settings"] |= {"inner": args.inner}
    load = machine.OtherLoad()
    rows = [measure(problem, args) for problem in ("batches", "lengths")]
    head["other_cores"] = load.mean_cores()
    print(f"{table(rows)}\n\n{machine.one_line(head['machine'])}; other programs kept {head['other_cores']:.1f} cores busy")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 0
