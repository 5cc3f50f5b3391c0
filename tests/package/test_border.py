"""One border with torch: what torch does not promise is named in two files, and a missing name costs its feature."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deq_compile import torch_parts

ROOT = Path(__file__).resolve().parents[2]
# The border; and kernels that are compiled apart, in which `torch._C` is a string.
BORDER = {"deq_compile/torch_parts.py", "deq_compile/capture/dynamo.py"}
PRIVATE = ("torch._", "torch.fx.experimental", "torch.utils._", "torch.autograd.forward_ad._", "torch.cuda._", "torch.backends._")
# Fields of torch's objects and names that its documents use, private by their spelling alone.
KNOWN = {"torch._check", "torch.__version__", "torch.__path__", "torch.__file__"}


def private_names(source: str) -> list[tuple[int, str]]:
    """(line, name) of each private part of torch that a file names, by import or by attribute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        found += [(node.lineno, n) for n in names if n.startswith(PRIVATE) and n not in KNOWN]
    longest: dict[tuple[int, str], None] = {}
    for line, name in found:
        if not any(other != name and other.startswith(name + ".") for at, other in found if at == line):
            longest[line, name] = None
    return sorted(longest)


def test_private_parts_of_torch_are_named_at_the_border() -> None:
    found = []
    for folder in ("deq_compile", "kernels", "passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name not in BORDER and not name.startswith(("deq_compile/kernels", "deq_compile/passes")):
                found += [f"{name}:{line} {what}" for line, what in private_names(path.read_text())]
    assert not found


def test_the_reader_sees_private_names() -> None:
    source = (
        "import torch._dynamo\nfrom torch._C import _a\nfrom torch import nn\nx = torch._C._b(torch.nn.c)\ny = torch._check(1)\n"
    )
    assert private_names(source) == [(1, "torch._dynamo"), (2, "torch._C._a"), (4, "torch._C._b")]


# ---- each name taken away

PROGRAM = """
import importlib, json, os, sys, traceback, warnings
import torch
import torch._dynamo.testing  # what torch itself needs of its parts is in place before they go
import torch._inductor.compile_fx
from torch._dynamo.backends import debugging, distributed

warnings.simplefilter("ignore")
torch.set_num_threads(1)
layer = torch.nn.Linear(4, 4)
torch.nn.init.orthogonal_(layer.weight, gain=0.5)
real = importlib.import_module


def model(x):
    z = torch.zeros_like(x)
    for _ in range(40):
        z = torch.tanh(layer(z) + x)
    return z


class Without:
    def __init__(self, inner, name):
        self.__dict__.update(inner=inner, name=name)

    def __getattr__(self, what):
        if what == self.name:
            raise AttributeError(f"no {what}")
        return getattr(self.inner, what)


def check(module, name, feature):
    importlib.import_module = lambda asked, *more: Without(real(asked), name) if asked == module else real(asked, *more)
    import deq_compile
    from deq_compile.backend import Backend
    from deq_compile.capture import OFF

    if feature == "regions":
        assert "regions" in OFF and "regions" in deq_compile.torch_parts.lost(), "it is not said"
        return  # what becomes of a model then is a test of its own (tests/capture/test_capture.py)
    x = torch.randn(3, 4, requires_grad=True)
    options = {"inner": "aot_eager", "tol": 1e-6, "backward_tol": 1e-6}
    run = torch.compile(model, backend=Backend(options))
    wanted = [x, layer.weight]
    for a, b in zip(torch.autograd.grad(run(x).sum(), wanted), torch.autograd.grad(model(x).sum(), wanted)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if feature:
        torch._dynamo.reset()
        report = deq_compile.explain(model, inner="eager")(x)
        assert any(feature in said for said in report.features_off), report.features_off
        assert report.regions, report


failed = []
for part in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        try:
            check(*part)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(part)
print(json.dumps(failed))
"""


def parts() -> list[tuple[str, str, str]]:
    """(module, name, feature) of every part at the border."""
    late = [(module, name, feature) for module, name, feature, _ in torch_parts._LATE.values()]
    return sorted({*torch_parts.PARTS, *late})


def test_the_border_has_a_list() -> None:
    names = {name for _, name, _ in parts()}
    assert len(names) > 40
    assert {"_enter_autocast", "compile_fx", "_AutoDispatchBelowAutograd"} <= names


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each name is taken away in a process of its own")
@pytest.mark.parametrize("half", [0, 1])
def test_a_missing_name_costs_its_feature(half: int) -> None:
    """The import works, values and gradients are right, and `explain` says what is off."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEQ_COMPILE_NATIVE": "0", "DEQ_COMPILE_RAISE": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(parts()[half::2])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr[-3000:]
