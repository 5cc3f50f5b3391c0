"""``python -m bench demo``: one unmodified model trained three ways on real digits, the same seeds, batches and steps.

Every row of the result is a process of its own, so that its peak memory is its own and nothing is warm from the row
before; Inductor starts with an empty cache, so that the first step shows the whole cost of compiling. A row that is
finished lies in ``build/demo`` and survives an interruption; ``--resume`` takes it up again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

from bench import machine
from bench.demo_model import WeightTiedClassifier, batches, digits
from bench.tables.cli import header

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"eager": "eager loop", "inductor": "torch.compile", "deq": 'torch.compile(backend="deq")'}
MISSING = "–"
SOLVES = "solves.png"
BUSY = 0.3  # cores; an idle machine shows less than 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, of: %(default)s")
    parser.add_argument("--steps", type=int, default=220, help="training steps (22 an epoch; default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples a step (default %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="size of the state (default %(default)s)")
    parser.add_argument("--loop", type=int, default=40, help="iterations of the user's loop (default %(default)s)")
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="default: all cores")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the deq backend, as JSON")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), help="the figure (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the finished rows there")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo", help="folder of the rows' JSON files")
    parser.add_argument("--resume", action="store_true", help="keep finished rows of a run with the same settings")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)  # the child's own call


def settings(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """All that decides a row's result; ``--resume`` compares it."""
    chosen = {name: getattr(args, name) for name in ("steps", "batch", "width", "loop", "threads")}
    versions = {name: machine.version(name) for name in ("torch", "deq_compile")}
    return {"row": row, **chosen, **versions, "options": args.options if row == "deq" else {}}


# ---- one row: the child


def peak_memory() -> float | None:
    """The largest resident set of this process so far, MB; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def accuracy(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers on the test set. The caller puts the model into eval mode."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def summary(solves: list[Any]) -> dict[str, Any]:
    """Means over the solves of training (those with a backward); the largest adjoint residual beside its mean."""
    trained = [record for record in solves if record.vjps is not None]
    if not trained:
        return {}

    def values(name: str) -> list[float]:
        return [float(value) for record in trained if (value := getattr(record, name)) is not None]

    def mean(name: str) -> float | None:
        found = values(name)
        return statistics.fmean(found) if found else None

    return {
        "solves": len(trained),
        "regions": len({record.region for record in trained}),
        "status": dict(Counter(str(record.status) for record in trained)),
        "iterations": mean("iterations"),
        "vjps": mean("vjps"),
        "converged": mean("converged"),
        "adjoint_residual": mean("adjoint_residual_mean"),
        "adjoint_residual_max": max(values("adjoint_residual"), default=None),
    }


def train(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """Train the model one way; everything that the table and the figure need."""
    torch.set_num_threads(args.threads)
    data = digits()
    torch.manual_seed(0)
    model = WeightTiedClassifier(width=args.width, n_iter=args.loop)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    plan = batches(len(data.train_x), args.batch, args.steps)
    step_model: Callable[[torch.Tensor], torch.Tensor] = model
    if row == "inductor":
        step_model = torch.compile(model)
    elif row == "deq":
        step_model = torch.compile(model, backend="deq", options=args.options)
    solves: list[Any] = []
    with contextlib.ExitStack() as stack:
        if row == "deq":
            from deq_compile import record_solves

            solves = stack.enter_context(record_solves())
        memory_before = peak_memory()
        losses: list[float] = []
        seconds: list[float] = []
        others: machine.OtherLoad | None = None
        progress = stack.enter_context(tqdm(plan, desc=f"{ROWS[row]:<30}", unit="step", dynamic_ncols=True))
        for indices in progress:
            x, y = data.train_x[indices], data.train_y[indices]
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(step_model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            others = others or machine.OtherLoad()  # from the second step on: no compiler processes
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    memory_after = peak_memory()  # before the evaluation: training only
    other_cores = others.mean_cores() if others else None

    model.eval()
    result = {
        "settings": settings(args, row),
        "machine": machine.describe(),
        "losses": losses,
        "seconds": seconds,
        "accuracy": accuracy(step_model, data.test_x, data.test_y),
        "memory_before": memory_before,
        "memory": memory_after,
        "other_cores": other_cores,
        "solves": summary(solves),
    }
    if row == "deq":
        draw_solves(solves, args.out / SOLVES)
        plain = WeightTiedClassifier(width=args.width, n_iter=args.loop)
        plain.load_state_dict(model.state_dict())
        result["accuracy_eager_loop"] = accuracy(plain.eval(), data.test_x, data.test_y)
    return result


def draw_solves(solves: list[Any], path: Path) -> None:
    """The course of training as its solves saw it; nothing where no region was found."""
    from deq_compile.watch import plot_solves

    trained = [record for record in solves if record.vjps is not None]
    if trained:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_solves(trained, path)


def child(args: argparse.Namespace) -> int:
    """Run one row and write its JSON file, also where it fails."""
    path = args.out / f"{args.row}.json"
    try:
        result, code = train(args, args.row), 0
    except Exception:
        result, code = {"settings": settings(args, args.row), "error": traceback.format_exc()}, 1
    path.write_text(json.dumps(result))
    return code


# ---- all rows: the parent


def run_row(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """Run ``row`` in a process of its own; its result, or a dict with ``error``."""
    path = args.out / f"{row}.json"
    if args.resume and path.exists():
        done: dict[str, Any] = json.loads(path.read_text())
        if done["settings"] == settings(args, row) and "error" not in done:
            print(f"{ROWS[row]}: taken from {path}")
            return done
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "demo", "--row", row, "--out", str(args.out)]
    for name in ("steps", "batch", "width", "loop", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--options", json.dumps(args.options)]
    with tempfile.TemporaryDirectory(prefix="deq-demo-") as cache:
        process = subprocess.run(command, cwd=ROOT, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, check=False)
    if not path.exists():  # killed, for instance for memory
        return {"settings": settings(args, row), "error": f"the process ended with exit status {process.returncode}"}
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """One column a row of the demo, one line a measure."""

    def number(value: float | None, form: str) -> str:
        return MISSING if value is None else format(value, form)

    def steady(result: dict[str, Any]) -> float:
        return statistics.median(result["seconds"][1:] or result["seconds"])

    eager = results.get("eager", {})
    lines: list[list[str]] = [
        ["step, median (ms)"],
        ["… quartiles"],
        ["speed-up against eager"],
        ["first step, with compilation (s)"],
        ["test accuracy"],
        ["… of its weights in the eager loop"],
        ["solver iterations, mean"],
        ["VJPs, mean"],
        ["adjoint residual, mean (max)"],
        ["samples converged"],
        ["peak memory (MB)"],
        ["… of it for training (MB)"],
        ["cores busy with other programs"],
    ]
    for result in results.values():
        if "error" in result:
            for line in lines:
                line.append("failed" if line is lines[0] else MISSING)
            continue
        solves, step = result["solves"], steady(result)
        growth = None if result["memory"] is None else result["memory"] - result["memory_before"]
        residual = MISSING
        if solves.get("adjoint_residual") is not None:
            residual = f"{solves['adjoint_residual']:.1e} ({number(solves['adjoint_residual_max'], '.1e')})"
        cells = [
            f"{1e3 * step:.1f}",
            "–".join(f"{1e3 * edge:.1f}" for edge in machine.quartiles(result["seconds"][1:])),
            f"{steady(eager) / step:.2f}×" if eager and "error" not in eager else MISSING,
            f"{result['seconds'][0]:.2f}",
            f"{result['accuracy']:.1%}",
            number(result.get("accuracy_eager_loop"), ".1%"),
            number(solves.get("iterations"), ".1f"),
            number(solves.get("vjps"), ".1f"),
            residual,
            number(solves.get("converged"), ".1%"),
            number(result["memory"], ".0f"),
            number(growth, ".0f"),
            number(result["other_cores"], ".1f"),
        ]
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell)
    alignment = ("left", *("right" for _ in results))
    headers = ["", *(ROWS[row] for row in results)]
    return tabulate(lines, headers=headers, tablefmt="github", colalign=alignment, disable_numparse=True)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Training loss against wall time, compilation included; the mean of the last eleven steps over the raw curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, (row, result) in enumerate(results.items()):
        if "error" in result:
            continue
        clock, losses = torch.tensor(result["seconds"]).cumsum(0), torch.tensor(result["losses"])
        smooth = torch.stack([losses[max(0, i - 10) : i + 1].mean() for i in range(len(losses))])
        axes.plot(clock, losses, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(clock, smooth, color=f"C{index}", label=f"{ROWS[row]}, {float(clock[-1]):.0f} s")
        axes.plot(clock[:1], losses[:1], "o", color=f"C{index}", markersize=4)
    axes.set(xlabel="wall time (s), the dot marks the end of the first step", ylabel="training loss", yscale="log")
    axes.set_title("The same model, batches and steps", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def explained(error: str) -> str:
    """The error of a row; in one sentence where only a compiler is missing, which the other rows do without."""
    if "InvalidCxxCompiler" in error:
        return "it needs a C++ compiler, and none was found. Fix: install g++ or clang++, or set CXX"
    return error


def report(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    finished = {row: result for row, result in results.items() if "error" not in result}
    print(f"\n{format_table(results)}\n")
    if finished:
        print(machine.one_line(next(iter(finished.values()))["machine"]))
        plot(results, args.plot)
        print(f"loss against wall time: {args.plot}")
    if "deq" in finished and (args.out / SOLVES).exists():
        print(f"the solves of training: {args.out / SOLVES}")
    busy = [row for row, result in finished.items() if (result["other_cores"] or 0.0) > BUSY]
    if busy:
        print(f"other programs ran beside {', '.join(busy)}: those times are not to be trusted", file=sys.stderr)
    statuses = finished.get("deq", {}).get("solves", {}).get("status")
    if statuses:
        counts = ", ".join(f"{name} {count}" for name, count in statuses.items())
        print(f"training solves by status: {counts}")
    for row, result in results.items():
        if "error" in result:
            print(f"\n{ROWS[row]} FAILED:\n{explained(result['error'])}", file=sys.stderr)


def store(args: argparse.Namespace, head: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """Write the rows that finished to ``args.json``, under where, when and with what they were measured."""
    chosen = {name: getattr(args, name) for name in ("steps", "batch", "width", "loop", "threads", "options")}
    finished = {row: result for row, result in results.items() if "error" not in result}
    head = {name: head[name] for name in ("date", "machine", "versions", "commit")}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**head, "settings": chosen, "rows": finished}, indent=1) + "\n")
    print(f"rows: {args.json}")


def main(args: argparse.Namespace) -> int:
    if args.row:
        return child(args)
    rows = args.rows.split(",")
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise SystemExit(f"--rows: expected some of {', '.join(ROWS)}; got {', '.join(unknown)}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        f"A weight-tied classifier, z ← tanh(0.9 W z + b + U x) {args.loop} times, width {args.width}, on the "
        f"handwritten digits of scikit-learn:\n{args.steps} steps of {args.batch} samples, {args.threads} threads."
    )
    torch.set_num_threads(args.threads)  # the head says how many the rows were given
    head = header(argparse.Namespace(threads=args.threads, repeats=args.steps))
    results: dict[str, dict[str, Any]] = {}
    interrupted = False
    try:
        for row in rows:
            results[row] = run_row(args, row)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted; finished rows are in {args.out}, `--resume` takes them up again", file=sys.stderr)
    if results:
        report(args, results)
    if args.json:
        store(args, head, results)
    if interrupted:
        return 130
    return 1 if any("error" in result for result in results.values()) else 0
