"""Capture switches on after a self-test, and off where Dynamo is not what it expects; everything else works then."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import explain
from deq_compile.capture import OFF
from deq_compile.capture.bytecode import Code
from deq_compile.capture.install import _FEATURES
from deq_compile.torch_parts import MISSING, NEEDED
from tests.fresh import python
from tests.helpers import compiled

install: Any = importlib.import_module("deq_compile.capture.install")

UNKNOWN_TORCH = """
{damage}
import warnings
warnings.simplefilter("ignore")
import logging
logging.disable(logging.WARNING)
import torch
from deq_compile import explain
from deq_compile.capture import OFF
if "known" in globals():
    dis.opmap = known
f = torch.nn.Linear(4, 4)
f.weight.data *= 0.3
def fixed(x):
    z = torch.zeros_like(x)
    for _ in range(20):
        z = torch.tanh(f(z) + x)
    return z
def until(x):
    z = torch.zeros_like(x)
    while True:
        new = torch.tanh(f(z) + x)
        if (new - z).norm() < 1e-5:
            return new
        z = new
x = torch.randn(2, 4)
for function in (fixed, until):
    found = torch.compile(function, backend="deq", options=dict(inner="eager"))(x)
    torch.testing.assert_close(found, function(x), rtol=1e-3, atol=1e-4)
print(len(explain(fixed, inner="eager")(x).regions), len(explain(until, inner="eager")(x).regions))
print(len(OFF), str(explain(until, inner="eager")(x)).count("off  "))
"""


def run(damage: str) -> list[str]:
    code = UNKNOWN_TORCH.format(damage=damage)
    done = python(code, "dynamo", DEQ_COMPILE_SELF_TESTS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_all_features_are_on() -> None:
    assert OFF == {}


def test_what_is_missing_costs_its_own_feature() -> None:
    """A module and a function of Dynamo's, DDPOptimizer, and two conveniences, none of which stops the import."""
    damage = (
        "import importlib, torch._dynamo.backends.distributed as distributed, torch.fx.traceback, torch._logging._internal\n"
        "del distributed.DDPOptimizer, torch.fx.traceback.annotate\n"
        "as_it_was = importlib.import_module\n"
        "def without(name, *more, **named):\n"
        "    if name in ('torch._dynamo.bytecode_analysis', 'torch._logging._internal'):\n"
        "        raise ImportError(name)\n"
        "    return as_it_was(name, *more, **named)\n"
        "importlib.import_module = without\n"
    )
    regions, none, off, shown = run(damage)
    assert (regions, none) == ("1", "0")
    # loops with a test or an open count, allclose in tests, numbers behind, their lines, bars around, whole graphs under DDP
    assert off == "7"
    assert shown == "9"  # and the two conveniences


@pytest.mark.parametrize("name", sorted({*NEEDED, *(need for feature in _FEATURES for need in feature.needs)}))
def test_a_missing_name_switches_its_features_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_installed", False)
    monkeypatch.setattr(install, "_try", lambda *_: None)
    monkeypatch.setattr(install, "OFF", off := {})  # type: ignore[var-annotated]
    monkeypatch.setitem(MISSING, name, f"no {name}")
    install.install()
    every = {install.EVERYTHING, *(feature.name for feature in _FEATURES)}
    assert set(off) == (every if name in NEEDED else {feature.name for feature in _FEATURES if name in feature.needs})
    assert set(off.values()) == {f"no {name}"}


def test_without_a_needed_name_nothing_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFF, install.EVERYTHING, "no FakeTensorMode")

    def loop(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(20):
            z = 0.5 * z + x
        return z

    x = torch.randn(2, 3)
    report = explain(loop, inner="eager")(x)
    assert not report.regions
    assert f"off         {install.EVERYTHING}: no FakeTensorMode" in str(report)
    torch.testing.assert_close(compiled(loop)[0](x), loop(x))


@pytest.mark.parametrize("read", ["item", "float", "bool"])
def test_self_tests_stand_for_every_way_to_read_a_number(read: str) -> None:
    """That these are one region on this very torch is what the self-test of loops vouches for."""

    def until(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            new = 0.5 * z + x
            gap = (new - z).norm()
            small = gap.item() < 1e-5 if read == "item" else float(gap) < 1e-5 if read == "float" else gap < 1e-5
            z = new
            if small:
                break
        return z

    x = torch.randn(2, 3)
    run, report = compiled(until, fullgraph=False)
    torch.testing.assert_close(run(x), 2 * x, rtol=1e-4, atol=1e-5)
    assert len(report.regions) == 1


def test_a_changed_method_switches_one_feature_off() -> None:
    """The method is there and does something else: the self-test of the loops finds no marker."""
    damage = (
        "import dis, torch._dynamo.symbolic_convert\n"
        "known = dis.opmap\n"  # no handler of jumps is found by the names that are expected
        "dis.opmap = {name: code for name, code in known.items() if 'POP_JUMP' not in name}\n"
    )
    regions, none, off, shown = run(damage)
    assert (regions, none) == ("1", "0")
    assert off == shown
    assert int(off) == 5  # allclose, numbers that grow and lines that are said are tested by a loop, open counts by a branch


def test_bodies_run_eagerly_where_they_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deq_compile.region.compiled", None)  # as if an import in it had failed
    weight = (torch.eye(3) * 0.37).requires_grad_()

    def loop(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(20):
            z = torch.sin(z @ weight) + x
        return z

    x = torch.randn(2, 3)
    run, report = compiled(loop, inner="aot_eager")
    (found,), (expected,) = (torch.autograd.grad(f(x).sum(), weight) for f in (run, loop))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert [region.status for region in report.regions] == ["solve"]


def test_another_backend_sees_nothing_of_it() -> None:
    def until(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        while True:
            new = 0.5 * z + x
            if (new - z).norm() < 1e-5:
                return new
            z = new

    graphs: list[Any] = []

    def other(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    x = torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(until, backend=other)(x), until(x))
    targets = [str(node.target) for gm in graphs for node in gm.graph.nodes]
    assert not any("may_exit" in target for target in targets)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(until, backend=other, fullgraph=True)(x)
    _, report = compiled(until)
    assert report.graphs == 0


def test_the_side_that_leaves_a_loop() -> None:
    """`for: test; if: break` as bytecode: 0 FOR_ITER, 1 test, 2 branch, 3 work, 4 back, 5 after."""

    def instruction(opname: str, place: int) -> SimpleNamespace:
        return SimpleNamespace(opname=opname, argval=None, target=None, positions=(place, place, 0, 9))

    names = ["FOR_ITER", "LOAD_FAST", "POP_JUMP_IF_TRUE", "LOAD_FAST", "JUMP_BACKWARD", "LOAD_FAST", "RETURN_VALUE"]
    code = [instruction(name, i) for i, name in enumerate(names)]
    code[0].target, code[2].target, code[4].target = code[5], code[5], code[0]
    found = Code(code).exit_of(code[2])
    assert found is not None
    assert (found.jumps, found.guard, found.counted) == (True, False, True)
    assert found.loop == frozenset({0, 1, 2, 3, 4})
    code[2].target = code[4]  # `continue`: both sides stay
    assert Code(code).exit_of(code[2]) is None
