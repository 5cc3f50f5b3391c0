"""One border with torch: what torch does not promise is named in three files, and a missing name costs its feature."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

from deq_compile import torch_parts
from deq_compile.capture.install import _FEATURES, _TESTED
from tests.fresh import python

ROOT = Path(__file__).resolve().parents[2]
BORDER = {"deq_compile/torch_parts.py", "deq_compile/capture/dynamo.py", "deq_compile/fsdp_parts.py"}
# Names that look private and are none of torch's: fields of enums, of CPython and its frames, and of Triton's kernels.
KNOWN = {"_value_", "_getframe", "_nb_ops", "_init_handles"}
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
import gc, importlib, importlib.machinery, json, os, sys, traceback, warnings
import torch  # and what torch itself needs of its parts, which is in place before they go
from torch._dynamo.backends import debugging, distributed

warnings.simplefilter("ignore")
layer = torch.nn.Linear(4, 4)
torch.nn.init.orthogonal_(layer.weight, gain=0.3)
real = importlib.import_module


def counted(x):
    z = torch.zeros_like(x)
    for _ in range(12):
        z = torch.tanh(layer(z) + x)
    return z


def tested(x):
    z = torch.zeros_like(x)
    while True:
        new = torch.tanh(layer(z) + x)
        if (new - z).norm() < 1e-6:
            return new
        z = new


class Without:
    def __init__(self, inner, name):
        self.__dict__.update(inner=inner, name=name)

    def __getattr__(self, what):
        name, _, more = self.name.partition(".")
        if what == name and not more:
            raise AttributeError(f"no {what}")
        found = getattr(self.inner, what)
        return Without(found, more) if what == name else found


def agree(run, model, x):
    wanted = [x, layer.weight]
    (value, *grads), (right, *others) = ((y := f(x), *torch.autograd.grad(y.sum(), wanted)) for f in (run, model))
    torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-4)
    for grad, other in zip(grads, others):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4)


def check(module, name, features, nothing, inner, model, self_tests):
    importlib.import_module = lambda asked, *more: Without(real(asked), name) if asked == module else real(asked, *more)
    import deq_compile
    if not self_tests:
        real("deq_compile.capture.install")._try = lambda feature, switch_on, test: switch_on()
    from deq_compile.backend import Backend

    model, x = globals()[model], torch.randn(3, 4, requires_grad=True)
    agree(torch.compile(model, backend=Backend({"inner": inner, "tol": 1e-6, "backward_tol": 1e-6})), model, x)
    if features:
        torch._dynamo.reset()
        report = deq_compile.explain(counted, inner="eager")(x)
        for feature in features:
            assert name in report.features_off[feature], report.features_off
        assert bool(report.regions) != nothing, report

    def solved(x):
        return deq_compile.fixed_point(lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x), tol=1e-6, backward_tol=1e-6)

    agree(solved, counted, x)  # which needs no graph, and none of those parts


# The package is compiled once for all of them: where no bytecode may be written, that is half of the time.
codes = {}
for folder, _, files in os.walk(os.path.join(os.getcwd(), "deq_compile"), followlinks=True):
    for path in (os.path.join(folder, file) for file in files if file.endswith(".py")):
        codes[path] = compile(open(path, "rb").read(), path, "exec", dont_inherit=True)
Loader = importlib.machinery.SourceFileLoader
compiled = Loader.source_to_code
Loader.source_to_code = lambda self, data, path, **more: codes.get(path) or compiled(self, data, path, **more)
with torch.no_grad():  # where autograd has started its threads, no process may fork
    torch.compile(counted, backend="aot_eager")(torch.randn(3, 4))
torch._dynamo.reset()
gc.disable()  # it would copy every page that a child shares with its parent
failed = []
for case in json.loads(os.environ["CASES"]):
    child = os.fork()
    if child == 0:
        try:
            check(*case)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(case[:2])
        print("---- without", *case[:2], file=sys.stderr)
print(json.dumps(failed))
"""
# What makes bodies, and Dynamo's own parts, need another program than the rest.
TRACED = (torch_parts.BODIES, torch_parts.INDUCTOR, torch_parts.AOT_EAGER)


def cases() -> list[tuple[Any, ...]]:
    """For every name at the border (module, name, what `explain` says is off, whether nothing is rewritten then, inner backend,
    model, whether capture is tried out before it is used: that takes a second, and only names that no feature says it needs are
    found out by it)."""
    late = [(module, name, feature) for module, name, feature, *_ in torch_parts._LATE.values()]
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for module, name in dynamo_parts():
        off = [feature.name for feature in _FEATURES if {name} & {*feature.needs, *_TESTED}]
        found[module, name] = module, name, off, False, "eager", "tested", not off
    for module, name, feature in sorted({*torch_parts.PARTS, *late}):
        inner = "aot_eager" if feature in TRACED else "eager"
        found[module, name] = module, name, [feature] if feature else [], feature == torch_parts.REGIONS, inner, "counted", False
    return list(found.values())


def dynamo_parts() -> list[tuple[str, str]]:
    """(module, name) of what capture/dynamo.py looks up."""
    calls = [node for node in ast.walk(ast.parse(sources()["deq_compile/capture/dynamo.py"])) if isinstance(node, ast.Call)]
    return [tuple(ast.literal_eval(a) for a in c.args[:2]) for c in calls if ast.unparse(c.func) == "find"]  # type: ignore[misc]


def test_the_border_has_a_list() -> None:
    names = {name for _, name, *_ in cases()}
    assert len(names) > 80
    assert {"_enter_autocast", "compile_fx", "_AutoDispatchBelowAutograd", "InstructionTranslator", "Node._rename"} <= names


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each name is taken away in a process of its own")
@pytest.mark.thorough
@pytest.mark.parametrize("half", [0, 1])
def test_a_missing_name_costs_its_feature(half: int) -> None:
    """The import works, values and gradients are right, and `explain` says what is off."""
    environment = {"DEQ_COMPILE_NATIVE": "0", "DEQ_COMPILE_RAISE": "1", "CASES": json.dumps(cases()[half::2])}
    done = python(PROGRAM, "dynamo", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr[-20000:]
