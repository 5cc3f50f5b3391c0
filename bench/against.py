"""``python -m bench against COMMIT``: whole training steps of this package and of an earlier commit's, in turns.

Each has a process of its own, on one thread, in process CPU time. The earlier one trains; this one has its weights before each
step, buffers included, and the same batch: two that train by themselves drift apart. Gradients behind the last step are compared
with those of a hundred iterations in float64.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.gradients.bodies import TRAINING_SAMPLES
from bench.trained import DEMO, exact_gradient, make

from .tables.cli import header
from .tables.runs import ROOT

PROBLEMS = ("mlp128", "mlp128sym", "mlp1024", "mlp1024sym", "conv", "transformer", DEMO)  # the tables', and the demo
PARTS = ("deq_compile", "kernels", "passes")  # of a commit
GRADIENT_BATCHES = 3

PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch, torch.nn.functional as F
import deq_compile
from bench.trained import LEARNING_RATE, make
root, problem, options, file = sys.argv[1:]
assert deq_compile.__file__.startswith(root), (deq_compile.__file__, root)
torch.set_num_threads(1)
model, inputs, labels, _ = make(problem)
compiled = torch.compile(model, backend="deq", options=json.loads(options))
parameters = list(model.parameters())
optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
print("ready", flush=True)
for line in sys.stdin:
    what, *rest = json.loads(line)
    if what == "load":
        with torch.no_grad():
            for mine, its in zip(model.state_dict().values(), torch.load(file)):
                mine.copy_(its)
        answer = None
    elif what == "save":
        answer = torch.save(list(model.state_dict().values()), file)
    else:
        x, y = inputs[rest[0]], labels[rest[0]]
        if what == "gradient":
            found = torch.autograd.grad(F.cross_entropy(compiled(x), y), parameters)
            answer = torch.save([g.detach() for g in found], file + ".gradient")
        else:
            begin = time.process_time()
            optimizer.zero_grad()
            F.cross_entropy(compiled(x), y).backward()
            optimizer.step()
            answer = time.process_time() - begin
    print(json.dumps(answer), flush=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("commit", help="what is compared with, as git names it")
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="comma-separated (default %(default)s)")
    parser.add_argument("--trained", type=int, default=100, help="steps before the timed ones (default %(default)s)")
    parser.add_argument("--timed", type=int, default=100, help="timed steps (default %(default)s)")
    parser.add_argument("--options", type=json.loads, default={"semantics": "equilibrium"}, help="of both, as JSON")
    parser.add_argument("--json", type=Path, help="write everything there, after each row")


class Lane:
    """A process that trains with one package."""

    def __init__(self, root: Path, problem: str, options: dict[str, Any], file: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DEQ_COMPILE_")}
        environment |= {"PYTHONPATH": os.pathsep.join([str(root), str(ROOT)]), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", PROGRAM, str(root), problem, json.dumps(options), file]
        self.file = file
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, *what: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def gradient(self, chosen: list[int]) -> torch.Tensor:
        self.ask("gradient", chosen)
        return torch.cat([g.flatten() for g in torch.load(self.file + ".gradient")]).double()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.end()
            raise SystemExit(f"a process of `bench against` ended with {status}, with the error above")
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def unpack(commit: str, where: Path) -> str:
    """Put the package of a commit there; its full name.

    Raises:
        SystemExit: git knows no such commit.
    """
    name = subprocess.run(
        ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if name.returncode:
        raise SystemExit(f"expected a commit of this repository, got {commit!r}: {name.stderr.strip()}")
    archive = subprocess.run(["git", "archive", name.stdout.strip(), *PARTS], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(where, filter="tar")
    return name.stdout.strip()


def measure(problem: str, roots: dict[str, Path], folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: medians of a step with both, and the gradients' errors."""
    file = os.path.join(folder, problem)
    lanes = {which: Lane(root, problem, args.options, file) for which, root in roots.items()}
    model, inputs, labels, batch = make(problem)
    before, after = lanes["before"], lanes["after"]
    generator, seconds = torch.Generator().manual_seed(3), {which: list[float]() for which in lanes}
    try:
        for i in range(args.trained + args.timed):
            chosen = torch.randint(0, TRAINING_SAMPLES, (batch,), generator=generator).tolist()
            before.ask("save")
            after.ask("load")
            for which in ("before", "after") if i % 2 else ("after", "before"):
                seconds[which].append(lanes[which].ask("step", chosen))
        before.ask("save")
        after.ask("load")
        with torch.no_grad():
            for mine, its in zip(model.state_dict().values(), torch.load(file), strict=True):
                mine.copy_(its)
        errors: dict[str, list[float]] = {which: [] for which in lanes}
        for i in range(GRADIENT_BATCHES):
            chosen = list(range(i * batch, (i + 1) * batch))
            exact = exact_gradient(model, inputs[chosen], labels[chosen])
            for which, lane in lanes.items():
                errors[which].append(float((lane.gradient(chosen) - exact).norm() / exact.norm()))
    finally:
        for lane in lanes.values():
            lane.end()
    timed = {which: found[args.trained :] for which, found in seconds.items()}
    ratios = [a / b for a, b in zip(timed["before"], timed["after"], strict=True)]
    return {
        "problem": problem, **{f"ms {which}": 1e3 * statistics.median(found) for which, found in timed.items()},
        "speed-up": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4),
        **{f"gradient error {which}": statistics.mean(found) for which, found in errors.items()},
    }  # fmt: skip


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    args.threads, args.repeats = 1, args.timed
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="deq-against-") as folder:
        earlier = Path(folder, "before")
        name = unpack(args.commit, earlier)
        for problem in args.problems.split(","):
            rows.append(measure(problem, {"before": earlier, "after": ROOT}, folder, args))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                found = {**header(args), "before": name, "trained": args.trained, "options": args.options, "rows": rows}
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    return 0
