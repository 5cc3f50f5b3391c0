"""``python -m bench sizes``: batches of many sizes, sequences of many lengths, loops of many counts: compilations, steady steps,
memory.

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
from torch._dynamo.utils import counters

from bench import machine
from bench.tables.cli import header

WIDTH = 64
Size = tuple[tuple[int, ...], int]  # of the input, and the count of the loop
Step = Callable[[Size], None]
COUNT = 30
PROBLEMS = ("batches", "lengths", "counts")


class Layer(nn.Module):
    """An implicit layer: dense with LayerNorm on (B, 64), or with attention on (B, T, 64)."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.inject, self.lin, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        nn.init.orthogonal_(self.lin.weight, gain=0.4)

    def forward(self, x: Tensor, count: int = COUNT) -> Tensor:
        u = self.inject(x)
        z = torch.zeros_like(u)
        for _ in range(count):
            h = self.lin(z)
            if self.attention:
                h = F.scaled_dot_product_attention(h[:, None], h[:, None], z[:, None])[:, 0]
            z = self.norm(0.5 * h + u)
        return z


def sizes_of(problem: str) -> list[Size]:
    """300 batch sizes, 50 lengths with batches of 2 to 16, or 300 counts from 20 to 80, drawn one by one."""
    rng = random.Random(0)
    if problem == "batches":
        return [((batch, WIDTH), COUNT) for batch in rng.sample(range(8, 400), 300)]
    if problem == "counts":
        return [((64, WIDTH), rng.randint(20, 80)) for _ in range(300)]
    return [((rng.randint(2, 16), length, WIDTH), COUNT) for length in rng.sample(range(8, 128), 50)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=40, help="timed turns a size (default %(default)s)")
    parser.add_argument("--compared", type=int, default=4, help="sizes that are compared (default %(default)s)")
    parser.add_argument("--inner", default="inductor", help="the backend of the rest (default %(default)s)")
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="which, of %(default)s")
    parser.add_argument("--json", type=Path, help="write everything there")


def step_of(model: nn.Module, inner: str, number: int = 0, **given: Any) -> Step:
    """A training step; `number` keeps its compiled bodies apart from those of other steps."""
    patches = {"kernel_name_max_ops": 10 + number} if inner == "inductor" else {}  # a cosmetic setting
    options: Any = {"inner": inner, "inductor": patches}
    run = torch.compile(model, backend="deq", options=options, **given)

    def step(size: Size) -> None:
        shape, count = size
        model.zero_grad()
        out = run(torch.randn(shape), *([] if count == COUNT else [count]))
        (out * out.detach().cos()).mean().backward()

    return step


def taken(step: Step, size: Size) -> float:
    step(size)
    begun = time.process_time()
    step(size)
    return time.process_time() - begun


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(problem: str, args: argparse.Namespace) -> dict[str, Any]:
    from deq_compile.testing import Program

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, sizes = Layer(problem == "lengths"), sizes_of(problem)
    compiled: list[str] = []
    original = Program._compile_joint

    def counting(self: Program, *given: Any) -> Any:
        compiled.append(type(self).__name__)
        return original(self, *given)

    Program._compile_joint = counting  # type: ignore[method-assign, assignment]
    step, peaks = step_of(model, args.inner), []
    counters.clear()
    begun = time.process_time()
    for size in sizes:
        step(size)
        peaks.append(peak_mib())
    first_round_s = time.process_time() - begun
    count, graphs, ratios = len(compiled), counters["stats"]["unique_graphs"], []
    for number, size in enumerate(random.Random(1).sample(sizes, args.compared), 1):
        alone = step_of(model, args.inner, number, dynamic=False)
        for _ in range(20):
            alone(size), step(size)
        ratios.append([taken(step, size) / taken(alone, size) for _ in range(args.turns)])
    Program._compile_joint = original  # type: ignore[method-assign]
    row = {"problem": problem, "sizes": len(set(sizes)), "body_compilations": count, "graphs": graphs}
    row |= {"first_round_s": first_round_s}
    row |= {"peak_mib_half_way": peaks[len(peaks) // 2], "peak_mib": peaks[-1]}
    return row | {
        "ratios": [statistics.median(found) for found in ratios],
        "ratio": statistics.median([r for found in ratios for r in found]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["problem"], row["sizes"], row["body_compilations"], row["graphs"], f"{row['first_round_s']:.1f}",
            f"{row['ratio']:.3f}",
            f"{min(row['ratios']):.3f}–{max(row['ratios']):.3f}", f"{row['peak_mib_half_way']:.0f} → {row['peak_mib']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    headers = [
        "problem",
        "sizes",
        "body compilations",
        "graphs",
        "first round (s)",
        "step / static",
        "by size",
        "peak memory (MiB)",
    ]
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    head = header(argparse.Namespace(threads=1, repeats=args.turns))
    head["settings"] |= {"inner": args.inner}
    load = machine.OtherLoad()
    rows = [measure(problem, args) for problem in args.problems.split(",")]
    head["other_cores"] = load.mean_cores()
    print(f"{table(rows)}\n\n{machine.one_line(head['machine'])}; other programs kept {head['other_cores']:.1f} cores busy")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 0
