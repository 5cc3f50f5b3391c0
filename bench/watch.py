"""``python -m bench watch``: what it costs to record a training's solves and to write each step to a CSV file.

The demo's model at several sizes, forward, loss and backward, plain and watched by a `SolveLogger` with a row a step, in turns in
one process; a turn is two steps of a kind, of which the second is timed. One thread, process CPU time. The ratio is the median of
the turns' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from bench import machine
from bench.demo_model import WeightTiedClassifier, batches, digits
from bench.tables.cli import header

WIDTHS = (64, 256, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="sizes of the state (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples a step (default %(default)s)")
    parser.add_argument("--turns", type=int, default=60, help="timed turns (default %(default)s)")
    parser.add_argument("--inner", default="inductor", help="the backend of the rest (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything there")


def taken(step: Callable[[], Any]) -> float:
    """Process CPU time of the second of two steps, in seconds."""
    step()
    begun = time.process_time()
    step()
    return time.process_time() - begun


def measure(width: int, batch: int, turns: int, inner: str) -> dict[str, Any]:
    from deq_compile.watch import SolveLogger

    torch.manual_seed(0)
    torch._dynamo.reset()
    data = digits()
    model = WeightTiedClassifier(width=width)
    run = torch.compile(model, backend="deq", options={"inner": inner})
    plan = iter(batches(len(data.train_x), batch, 4 * turns + 20))

    def step() -> None:
        indices = next(plan)
        model.zero_grad()
        F.cross_entropy(run(data.train_x[indices]), data.train_y[indices]).backward()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, SolveLogger(Path(folder) / "solves.csv", rows.append) as log:

        def watched() -> None:
            step()
            log.step()

        log.pause()
        for _ in range(20):  # the first calls compare with the loop
            step()
        times: dict[str, list[float]] = {"plain": [], "watched": []}
        for _ in range(turns):
            times["plain"].append(taken(step))
            log.resume()
            times["watched"].append(taken(watched))
            log.pause()
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    medians = {f"{name}_ms": 1e3 * statistics.median(found) for name, found in times.items()}
    verdicts = sorted({row["verdict"] for row in rows})
    counts = {name: statistics.fmean(row[name] for row in rows) for name in ("iterations", "vjps")} if rows else {}
    quartiles = machine.quartiles(ratios)
    return {"width": width, **medians, "ratio": statistics.median(ratios), "quartiles": quartiles, "verdicts": verdicts, **counts}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["width"], f"{row['plain_ms']:.2f}", f"{row['watched_ms']:.2f}", f"{row['ratio']:.3f}",
            "–".join(f"{edge:.3f}" for edge in row["quartiles"]), " ".join(row["verdicts"]) or "given back",
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["width", "plain (ms)", "watched (ms)", "ratio", "quartiles", "verdict"]
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    head = header(argparse.Namespace(threads=1, repeats=args.turns))
    head["settings"] |= {"batch": args.batch, "inner": args.inner}
    load = machine.OtherLoad()
    rows = [measure(int(width), args.batch, args.turns, args.inner) for width in args.widths.split(",")]
    head["other_cores"] = load.mean_cores()
    print(f"{table(rows)}\n\n{machine.one_line(head['machine'])}; other programs kept {head['other_cores']:.1f} cores busy")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 0
