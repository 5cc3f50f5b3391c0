"""``python -m bench gpu``: everything that only a device can tell, in one command.

Facts and copy bandwidth; correctness of kernels and compiled models; the first experiments, with their predictions; every kernel
at real shapes; whole training steps. Each part is a process of its own with a time limit, and writes its rows as they come to
OUT/gpu-rows.jsonl. A short table is printed last; all rows go to OUT/gpu-DEVICE-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .common import Row, Setting, read

ROOT = Path(__file__).resolve().parents[2]
# Part, and how many seconds it gets: under eight minutes in all.
PARTS = {"facts": 30, "correct": 150, "experiments": 90, "kernels": 80, "steps": 110}
TUNING = 240  # a part of its own, with --tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for rows and JSON (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="no device: tiny shapes, Triton interpreted, stand-ins for CUDA")
    parser.add_argument("--parts", default=",".join(PARTS), help="of: %(default)s")
    parser.add_argument("--tune", action="store_true", help="only sweep the tiles, and save those that are faster (4 minutes)")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def child(args: argparse.Namespace) -> int:
    """Run one part in this process."""
    seconds = 600 if args.dry_run else PARTS.get(args.child, TUNING)
    setting = Setting(args.child, args.out / "gpu-rows.jsonl", args.dry_run, seconds)
    if args.dry_run:
        import warnings

        from .interpreter import quicken
        from .rehearse import rehearsed

        quicken()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy on the inf and NaN that are masked away
            with rehearsed():
                run_part(setting)
    else:
        run_part(setting)
    return 0


def run_part(setting: Setting) -> None:
    from . import correct, experiments, facts, kernel_times, steps, tuning

    if setting.part == "tuning":
        tuning.run(setting, save=not setting.dry)
        return
    if setting.part == "kernels":
        rates = [r["GB_per_s"] for r in read(setting.file) if r["what"] == "copy bandwidth" and "GB_per_s" in r]
        kernel_times.run(setting, max(rates, default=float("nan")))
        return
    {"facts": facts.run, "correct": correct.run, "experiments": experiments.run, "steps": steps.run}[setting.part](setting)


def main(args: argparse.Namespace) -> int:
    if args.child:
        return child(args)
    chosen = ["facts", "tuning"] if args.tune else args.parts.split(",")
    if unknown := [p for p in chosen if p not in (*PARTS, "tuning")]:
        raise SystemExit(f"--parts: expected some of {', '.join(PARTS)}; got {', '.join(unknown)}")
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("bench gpu: expected a CUDA device, found none. Fix: run it where there is one, or add --dry-run")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu-rows.jsonl"
    file.unlink(missing_ok=True)
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if args.dry_run else {})}
    failed = []
    for part in chosen:
        print(f"--- {part}", flush=True)
        command = [sys.executable, "-m", "bench", "gpu", "--child", part, "--out", str(args.out)]
        begun = time.monotonic()
        try:
            limit = None if args.dry_run else PARTS.get(part, TUNING) + 30
            done = subprocess.run(
                command + ["--dry-run"] * args.dry_run, cwd=ROOT, env=environment, timeout=limit, check=False
            )
            outcome = "" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = "stopped at its limit"
        if outcome:
            failed.append(f"{part}: {outcome}")
        print(f"    {part}: {time.monotonic() - begun:.0f} s {outcome}", flush=True)
    return report(args.out, file, failed, args.dry_run)


def report(out: Path, file: Path, failed: list[str], dry: bool) -> int:
    from .report import table

    rows = read(file)
    facts = next((r for r in rows if r["what"] == "device"), {})
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "dry-run" if dry else str(facts.get("device", "unknown")))
    target = out / f"gpu-{name}-{time.strftime('%Y-%m-%d')}.json"
    target.write_text(json.dumps({"facts": facts, "failed_parts": failed, "rows": rows}, indent=1) + "\n")
    print(table(rows, failed))
    print(f"rows: {target}")
    return 1 if failed or any(bad(r) for r in rows) else 0


def bad(row: Row) -> bool:
    return "error" in row or row.get("ok") is False
