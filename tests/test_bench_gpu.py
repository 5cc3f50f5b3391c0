"""`python -m bench gpu`: a rehearsal of some of its parts as a user would start it, and what it makes of rows."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import cli, report
from bench.gpu.peer import solve
from bench.problems import MLP

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--parts", "facts,experiments", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "checks passed" in done.stdout
    (file,) = tmp_path.glob("gpu-dry-run-*.json")
    found = json.loads(file.read_text())
    assert not found["failed_parts"]
    assert found["facts"]["torch"] == torch.__version__
    checked = [row for row in found["rows"] if "ok" in row]
    assert len(checked) >= 6
    assert all(row["ok"] for row in checked)


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m bench gpu`, in this process: a SystemExit with a text goes to stderr, and its status is 1."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["bench", "gpu"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("bench", run_name="__main__", alter_sys=True)
    assert isinstance(stopped.value.code, str)
    assert "expected a CUDA device, found none. Fix: run it where there is one, or add --dry-run" in stopped.value.code


def test_what_is_wrong_comes_first_and_decides() -> None:
    rows = [
        {"part": "correct", "what": "kernels", "ok": True},
        {"part": "correct", "what": "model", "ok": False, "model": "conv"},
        {"part": "steps", "what": "step", "error": "RuntimeError: no"},
    ]
    assert [cli.bad(row) for row in rows] == [False, True, True]
    text = report.table(rows, ["steps: stopped at its limit"])
    assert "1 of 2 checks passed" in text
    assert "WRONG correct / model: {'model': 'conv'}" in text
    assert "PART FAILED steps: stopped at its limit" in text


def test_it_fits_into_eight_minutes() -> None:
    assert sum(cli.PARTS.values()) < 8 * 60


def test_the_peer_solves_and_differentiates() -> None:
    """The eager solver that deq is timed against has the implicit gradient, in float64."""
    torch.manual_seed(0)
    model, x = MLP(12, 200, "before").double(), torch.randn(3, 12, dtype=torch.float64)
    c = torch.randn_like(x)
    (model(x) * c).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    u = model.injection(x)
    (solve(lambda z: model.body(z, u), torch.zeros_like(x), 1e-9, 60) * c).sum().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)
