"""Conducting a call: compile ahead, start one group after the other, stop what hangs, tell what came of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import cli
from .plan import BESIDE_COMPILING, CALL_SECONDS, COMPILING, GRACE, Group
from .store import Results, Store, bad, merged


class Call:
    """One start of `bench gpu`: its store, its run, and its processes. Nothing outlives it."""

    def __init__(self, args: argparse.Namespace, groups: Sequence[Group]) -> None:
        self.args, self.groups = args, groups
        self.store = Store(cli.results_file(args.out, args.dry_run))
        self.run = self.store.begin(call=args.call, parts=[g.label for g in groups], dry=args.dry_run)
        # A rehearsal is not bound to a lease, and its clock means nothing.
        self.until = time.time() + (3600 if args.dry_run else CALL_SECONDS if args.call else 2 * CALL_SECONDS)

    def start(self, child: str, until: float, share: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-u", "-m", "bench", "gpu", "--child", child, "--out", str(self.args.out)]
        command += ["--until", repr(until), "--run", str(self.run), "--share", share, "--call", str(self.args.call)]
        command += ["--parts", ",".join(g.label for g in self.groups)] + ["--dry-run"] * self.args.dry_run
        environment = cli.environment(self.args.dry_run)
        if child == "compile":
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are many already
        return subprocess.Popen(command, cwd=cli.ROOT, env=environment)

    def compile_ahead(self) -> list[subprocess.Popen[bytes]]:
        """Start the processes that compile what the groups need; they are waited for by `wait_for_compilers`."""
        if all(g.part in (*BESIDE_COMPILING, "tuning") for g in self.groups):
            return []
        count = max(min((os.cpu_count() or 2) - 4, 12), 1)
        until = min(time.time() + COMPILING[self.args.call], self.until)
        return [self.start("compile", until, f"{i}/{count}") for i in range(count)]

    def wait_for_compilers(self, compilers: list[subprocess.Popen[bytes]], begun: float) -> None:
        """What comes next is timed, or needs what they compile. They end by themselves at their time; what hangs is stopped."""
        limit = begun + COMPILING[self.args.call] + GRACE
        outcomes = [wait(c, limit - time.time()) for c in compilers]
        told = "; ".join(sorted({o for o in outcomes if o}))
        self.outcome("compile", "", time.time() - begun, told)

    def conduct(self) -> None:
        if self.args.dry_run:  # no device that a group could break: one process, one import of torch
            self.outcome("rehearsal", "", 0.0, wait(self.start("all", self.until, "0/1"), None))
            return
        begun = time.time()
        compilers = self.compile_ahead()
        try:
            for group in self.groups:
                if compilers and group.part not in BESIDE_COMPILING:
                    self.wait_for_compilers(compilers, begun)
                    compilers = []
                self.one(group)
        finally:
            for compiler in compilers:
                stop(compiler)

    def one(self, group: Group) -> None:
        left = self.until - time.time()
        if left < 10:
            self.outcome(group.part, group.name, 0.0, "not begun: the call's time is up")
            return
        print(f"--- {group.label} ({group.seconds:.0f} s)", flush=True)
        begun = time.time()
        seconds = min(group.seconds, left - GRACE)
        outcome = wait(self.start(group.label, begun + seconds), seconds + GRACE)
        self.outcome(group.part, group.name, time.time() - begun, outcome)

    def outcome(self, part: str, name: str, seconds: float, outcome: str) -> None:
        row = {"run": self.run, "part": part, "group": name, "what": "outcome", "outcome": outcome, "seconds": round(seconds, 1)}
        self.store.add(row)
        print(f"    {part}{'.' * bool(name)}{name}: {seconds:.0f} s {outcome}", flush=True)


def wait(process: subprocess.Popen[bytes], seconds: float | None) -> str:
    """Wait for a process, and stop it with all that it started when its seconds are over. "" if it ended well."""
    try:
        status = process.wait(timeout=None if seconds is None else max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        stop(process)
        return "stopped at its limit"
    except BaseException:
        stop(process)
        raise
    return "" if status == 0 else f"exit status {status}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a child's process group, which it made itself, so that Inductor's workers go with it."""
    if process.poll() is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come that far
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: nothing more can be done
        process.wait(timeout=10)


def run(args: argparse.Namespace, groups: Sequence[Group]) -> int:
    """All of a call, then the report. 0: nothing of ours was wrong, and every group came to its end."""
    call = Call(args, groups)
    call.conduct()
    from .report import table

    results = merged([call.store.read()])
    print(table(results))
    print(f"results: {call.store.file}")
    ours = [row for row in results.rows if row["run"] == max((r["run"] for r in results.rows), default=0)]
    ended_badly = any(row["what"] == "outcome" and row["outcome"] for row in ours)
    return 1 if ended_badly or any(bad(row) for row in ours) else 0


def load(files: Sequence[Path]) -> Results:
    """Results of files, merged.

    Raises:
        SystemExit: one is not there.
    """
    for file in files:
        if not file.exists():
            raise SystemExit(f"bench gpu: expected results in {file}, found no such file. Fix: run `python -m bench gpu` first")
    return merged([Store(file).read() for file in files])


def show_goals(files: Sequence[Path]) -> int:
    from .goals import table

    print(table(load(files)))
    return 0


def show_readme(files: Sequence[Path]) -> int:
    from .readme import table

    print(table(load(files)))
    return 0
