"""An example as a module, from its file: the folder is no package, since each script stands alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.fresh import python

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """`examples/<name>.py`, anew at each call."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


def two_ranks(script: str) -> list[dict[str, Any]]:
    """What each of two processes of an example says of ten steps, in order of ranks; what holds of any of them is checked."""
    options = {"tol": 1e-6, "backward_tol": 1e-5, "inner": "eager"}
    arguments = ["--check", "--steps", "10", "--options", json.dumps(options)]
    # scikit-learn, which examples import, is imported once for both.
    program = "import torch, sklearn.datasets\nfrom tests.models.ranks_launch import as_a_script, launched\n"
    program += f"launched(2, as_a_script, 'examples/{script}.py', {arguments})"
    done = python(program, "dynamo", DEQ_COMPILE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    said = sorted((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), key=lambda s: s["rank"])
    assert [s["rank"] for s in said] == [0, 1]
    assert [s["statuses"] for s in said] == [["solve"]] * 2
    assert said[0]["losses"] != said[1]["losses"]  # each saw samples of its own
    assert said[0]["weights"] == said[1]["weights"]
    assert said[0]["distance"] < 1e-5
    assert said[0]["losses"][-1] < said[0]["losses"][0]
    return said
