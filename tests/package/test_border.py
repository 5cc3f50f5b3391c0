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
BORDER = {"deq_compile/torch_parts.py", "deq_compile/capture/dynamo.py"}
# Names that look private and are none of torch's: fields of enums, of CPython's frames, and of Triton's kernels.
KNOWN = {"_value_", "_getframe", "_init_handles"}
# Ways to reach a name by a string.
BY_STRING = {"find", "getattr", "hasattr", "setattr", "import_module", "__import__"}
PUBLIC = "torch.fx.experimental"  # a name without an underscore that torch does not promise either


def private_names(source: str, own: frozenset[str] = frozenset()) -> list[tuple[int, str]]:
    """(line, name) of each private part of torch that a file names: by import, by attribute under whatever name the module goes
    here, as an attribute of any object that the package itself does not give such a one (`own`), or by a string."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    found: set[tuple[int, str]] = set()
    below: set[ast.AST] = set()  # parts of a longer name, which is told as a whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names if _is_private(alias.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {(node.lineno, name) for name in names if _is_private(name)}
        elif isinstance(node, ast.Attribute) and node not in below:
            below |= set(ast.walk(node.value))
            name = _dotted(node, aliases)
            if _is_private(name) if name else _is_foreign(node, own):
                found.add((node.lineno, name or ast.unparse(node)))
        elif isinstance(node, ast.Call) and _by_string(node):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found |= {(node.lineno, text) for text in texts if _is_private(text) or _stranger(text, own)}
    return sorted(found)


def _aliases(tree: ast.AST) -> dict[str, str]:
    """What names that were imported stand for."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return known


def _dotted(node: ast.Attribute, aliases: dict[str, str]) -> str:
    """The full name of an attribute of a module; "" where it is one of something else."""
    parts: list[str] = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        parts.insert(0, value.attr)
        value = value.value
    return ".".join([aliases[value.id], *parts]) if isinstance(value, ast.Name) and value.id in aliases else ""


def _is_private(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "torch" and (name.startswith(PUBLIC) or any(_hidden(part) for part in parts))


def _hidden(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def _is_foreign(node: ast.Attribute, own: frozenset[str]) -> bool:
    """Whether some part of `something._a.b` is a private attribute that the package does not define."""
    parts = [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)]
    return any(_stranger(part, own) for part in parts)


def _stranger(name: str, own: frozenset[str]) -> bool:
    return name.isidentifier() and _hidden(name) and name not in own | KNOWN and not name.startswith("_deq_compile")


def _by_string(node: ast.Call) -> bool:
    return getattr(node.func, "id", getattr(node.func, "attr", "")) in BY_STRING


def defined(source: str) -> set[str]:
    """Private names that a file gives something: functions, classes, attributes that are assigned or declared, and slots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("self", "cls", "member") else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if _hidden(name)}


def sources() -> dict[str, str]:
    """Every file of the package by its path; those of links once."""
    paths = [path for folder in ("deq_compile", "kernels", "passes") for path in sorted((ROOT / folder).rglob("*.py"))]
    files = {str(path.relative_to(ROOT)): path for path in paths}
    return {n: p.read_text() for n, p in files.items() if not n.startswith(("deq_compile/kernels", "deq_compile/passes"))}


def test_private_parts_of_torch_are_named_at_the_border() -> None:
    files = sources()
    assert files.keys() >= BORDER
    own = frozenset().union(*(defined(source) for source in files.values()))
    found = [
        f"{name}:{line} {what}"
        for name, source in files.items()
        if name not in BORDER
        for line, what in private_names(source, own)
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("import torch\ny = torch._C._b(torch.nn.c)", ["torch._C._b"]),
        ("from torch._C import _a", ["torch._C._a"]),
        ("from torch.utils import _pytree as pytree\npytree.tree_map", ["torch.utils._pytree", "torch.utils._pytree.tree_map"]),
        ("from torch.fx.experimental.proxy_tensor import make_fx", ["torch.fx.experimental.proxy_tensor.make_fx"]),
        ("from torch.autograd import forward_ad\nforward_ad._current_level", ["torch.autograd.forward_ad._current_level"]),
        ("import torch as t\nt._check(1)", ["torch._check"]),
        ("def f(node):\n    node._rename('a')\n    node.graph._insert.name", ["node._rename", "node.graph._insert.name"]),
        ("find('torch._C', 'name')\ngetattr(model, '_orig_mod', None)", ["torch._C", "_orig_mod"]),
        ("import torch\nfrom torch import nn\ntorch.__version__, nn.Linear, self._own, '_text'", []),
    ],
)
def test_the_reader_sees_private_names(source: str, found: list[str]) -> None:
    assert [name for _, name in private_names(source, frozenset(["_own"]))] == found


def test_the_reader_sees_what_a_file_defines() -> None:
    source = "class _A:\n    _b: int\n    def _c(self):\n        self._d = 1\n        other._e = 2\n        self.f = 3"
    assert defined(source) == {"_A", "_b", "_c", "_d"}


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
