"""Two processes with sharded parameters train as one does on their batches together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.examples.loading import EXAMPLES, example

pytest.importorskip("sklearn")
TIGHT = {"tol": 1e-6, "backward_tol": 1e-5, "inner": "eager"}
PARAMETERS = 2 * (64 * 64 + 64) + 10 * 64 + 10


def test_two_ranks_are_one_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "examples/fsdp2.py", "--check", "--steps", "10", "--options", json.dumps(TIGHT)],
        cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "DEQ_COMPILE_NATIVE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = sorted((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), key=lambda s: s["rank"])
    assert [s["rank"] for s in said] == [0, 1]
    assert [s["statuses"] for s in said] == [["solve"]] * 2
    assert said[0]["losses"] != said[1]["losses"]  # each saw samples of its own
    assert said[0]["weights"] == said[1]["weights"]
    assert [s["held"] for s in said] == [PARAMETERS // 2] * 2
    assert said[0]["distance"] < 1e-5
    assert said[0]["losses"][-1] < said[0]["losses"][0]


def test_a_plain_process_is_told_how_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"Fix: torchrun --nproc-per-node 2 examples/fsdp2\.py"):
        example("fsdp2").main()
