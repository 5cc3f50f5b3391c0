"""Programs that run where nothing of ours has been imported yet, in forks of one process (`tests/models/forking.py`)."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNLIKE = ("PYTHON", "TORCH", "OMP_", "MKL_", "CXX")  # read before a program begins: such a program needs a Python of its own


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "models" / "forking.py")]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # a number that is set while a process runs does not outlive a fork
    found = subprocess.Popen(command, cwd=ROOT, env=one, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(found.communicate)  # which ends its input
    return found


def python(code: str, stage: str = "parts", cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a program comes to that begins with `import torch`.

    stage: what is there before it: "torch" alone; the "parts" of it that Dynamo will want; or "dynamo", and Inductor, themselves.
    """
    assert not any(name.startswith(UNLIKE) for name in environment)
    if not hasattr(os, "fork"):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        asked = {"code": code, "stage": stage, "cwd": str(cwd), "stdout": str(out), "stderr": str(err)}
        print(json.dumps({**asked, "env": {**os.environ, "OMP_NUM_THREADS": "1", **environment}}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(["-c"], status, out.read_text(), err.read_text())
