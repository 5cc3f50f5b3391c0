"""``python -m bench gradients``: how good each backward is, what it costs, and what a model trained with it is worth.

Two parts. "quality": bodies trained here with fixed seeds, forward tolerances 1e-2 to 1e-6, every mode against the gradient in
float64 (fixed point to 1e-11, adjoint by a dense solve): cosine and relative error of the parameter gradient, products, time.
"training": accuracy and time of models trained with each mode, over several seeds. Weights and finished rows lie in
build/gradients and survive an interruption; --resume takes them up again. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.tables.cli import commit
from bench.tables.runs import ROOT

from . import report, study
from .bodies import HELD_OUT, RECIPES, TRAINED
from .modes import MODES
from .tasks import REGIONS, TASKS, train

TRAINING_MODES = ("jfb", "phantom-5", "raw", "reuse<1e-1", "reuse<1e-2", "exact", *REGIONS)
QUICK_BODIES, QUICK_MODES = ("mlp", "prenorm"), ("jfb", "reuse<1e-1")
PARTS = ("quality", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two bodies, one seed, two tolerances, short trainings (a minute)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the trainings (default %(default)s)")
    parser.add_argument("--bodies", help=f"comma-separated, of: {', '.join(RECIPES)}; default: all")
    parser.add_argument("--modes", help=f"of the trainings, comma-separated; default: {','.join(TRAINING_MODES)}")
    parser.add_argument("--resume", action="store_true", help="keep rows of an interrupted run")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--plot", type=Path, help="error against products, and accuracy by mode")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file instead of measuring")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gradients", help="folder of weights and unfinished runs")


def tasks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be measured, one row or one group of rows each."""
    parts = args.parts.split(",")
    if unknown := [p for p in parts if p not in PARTS]:
        raise SystemExit(f"--parts: expected some of {', '.join(PARTS)}; got {', '.join(unknown)}")
    bodies = args.bodies.split(",") if args.bodies else list(QUICK_BODIES if args.quick else RECIPES)
    if unknown := [b for b in bodies if b not in RECIPES]:
        raise SystemExit(f"--bodies: expected some of {', '.join(RECIPES)}; got {', '.join(unknown)}")
    if "quality" in parts:
        yield from _quality(bodies, args)
    if "training" in parts:
        yield from _training(args)


def _quality(bodies: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in (0,) if args.quick else study.SEEDS:
        for body in bodies:
            for tol in (1e-3, 1e-5) if args.quick else study.TOLERANCES if seed == 0 else (1e-3, 1e-4):
                yield {"part": "quality", "body": body, "seed": seed, "tol": tol}


def _training(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    modes = args.modes.split(",") if args.modes else QUICK_MODES if args.quick else TRAINING_MODES
    if unknown := [m for m in modes if m not in (*MODES, *REGIONS)]:
        raise SystemExit(f"--modes: expected some of {', '.join((*MODES, *REGIONS))}; got {', '.join(unknown)}")
    for seed in range(1 if args.quick else args.seeds):
        for task in TASKS:
            for mode in modes:
                yield {"part": "training", "task": task, "mode": mode, "seed": seed, "steps": 20 if args.quick else None}


def run(task: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    if task["part"] == "training":
        return [dataclasses.asdict(train(task["task"], task["mode"], task["seed"], task["steps"]))]
    return study.rows(task["body"], task["seed"], task["tol"], args.out / "weights", list(MODES))


def main(args: argparse.Namespace) -> int:
    if args.show:
        report.present(json.loads(args.show.read_text()), args.plot)
        return 0
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / ("rows-quick.jsonl" if args.quick else "rows.jsonl")
    if not args.resume:
        file.unlink(missing_ok=True)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for task in tasks(args):
        if any(entry["task"] == task for entry in done):
            continue
        print(json.dumps(task), file=sys.stderr, flush=True)
        entry = {"task": task, "rows": run(task, args)}
        done.append(entry)
        with file.open("a") as out:
            out.write(json.dumps(entry) + "\n")
    wanted = list(tasks(args))
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "torch": machine.version("torch"),
        "commit": commit(),
        "bodies": {"chosen on": list(TRAINED), "held out": list(HELD_OUT)},
        **{part: [r for e in done if e["task"] in wanted and e["task"]["part"] == part for r in e["rows"]] for part in PARTS},
    }
    report.present(found, args.plot)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
