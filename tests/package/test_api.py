"""The ways in: decorator on class, module and function; torch.compile by name; explain; options; logging."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deq_compile as dq
from deq_compile import Reason, deq_compile, explain, record_solves
from deq_compile.config import Options
from deq_compile.inner import has_cpp_compiler
from tests.helpers import TIGHT, largest_error, reference, value_and_grads
from tests.models.loops import CASES
from tests.models.parts import Linear, Loop, contract

ROOT = Path(__file__).resolve().parents[2]


@deq_compile(**TIGHT)
class Decorated(nn.Module):
    """A class at module level, so that it can be pickled."""

    def __init__(self, n: int = 40) -> None:
        super().__init__()
        self.f, self.n = Linear(), n
        contract(self)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.n):
            z = self.f(z, x)
        return z


class Child(Decorated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def solves_of(model: nn.Module, x: Tensor) -> int:
    with record_solves() as solves:
        model(x)
    return len(solves)


def test_decorated_class() -> None:
    model, x = Decorated(), torch.randn(3, 16)
    assert type(model) is Decorated
    assert list(model.state_dict()) == list(Loop(Linear()).state_dict())
    with record_solves() as solves:
        found = value_and_grads(model, model, x)
    assert [s.status for s in solves] == ["solve"]
    plain = Loop(Linear(), 40)
    plain.load_state_dict(model.state_dict())
    assert largest_error(found, reference(plain, x)) < 2e-3


def test_decorated_class_copies_pickles_and_subclasses() -> None:
    model, x = Decorated(), torch.randn(3, 16)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is Decorated
        torch.testing.assert_close(twin(x), expected)
        assert solves_of(twin, x) == 1
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = Decorated()
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(other(x), expected)
    child = Child()
    child.load_state_dict(model.state_dict())
    assert isinstance(child, Decorated)
    assert solves_of(child, x) == 1
    torch.testing.assert_close(child(x), 2 * expected)


def test_decorated_class_without_arguments() -> None:
    @deq_compile
    class Bare(Loop):
        pass

    assert Bare.__name__ == "Bare"
    assert issubclass(Bare, Loop)


def test_decorated_module_is_the_same_object() -> None:
    model, x = CASES["linear"].make()
    expected = model(x)
    same = deq_compile(model, **TIGHT)
    assert same is model
    with record_solves() as solves:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(solves) == 1
    assert torch.equal(copy.deepcopy(model).f.W.weight, model.f.W.weight)
    assert list(pickle.loads(pickle.dumps(model)).state_dict()) == list(model.state_dict())


def test_decorated_function_and_method() -> None:
    f = Linear()
    contract(f)

    @deq_compile(**TIGHT)
    def equilibrium(x: Tensor) -> Tensor:
        """A docstring."""
        z = torch.zeros_like(x)
        for _ in range(40):
            z = f(z, x)
        return z

    x = torch.randn(3, 16)
    with record_solves() as solves:
        z = equilibrium(x)
    assert len(solves) == 1
    assert (equilibrium.__name__, equilibrium.__doc__) == ("equilibrium", "A docstring.")
    torch.testing.assert_close(f(z, x), z, rtol=1e-4, atol=1e-5)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.f = inner, Linear()
        contract(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        z = torch.zeros_like(x)
        for _ in range(40):
            z = self.f(z, x)
        return z


@pytest.mark.parametrize("form", ["class", "module", "function"])
def test_decorated_inside_an_outer_compile(form: str) -> None:
    """Traced through into one graph; each option holds where it was set."""
    loose = {"tol": 1e-2, "verify": "never", "inner": "eager"}
    inner: nn.Module = Loop(Linear(), 40)
    if form == "class":
        inner = deq_compile(**loose)(type("Loose", (Loop,), {}))(Linear(), 40)
    elif form == "module":
        inner = deq_compile(inner, **loose)
    outer = Outer(inner)
    if form == "function":
        plain = Loop(Linear(), 40)
        contract(plain)
        outer.inner = nn.Identity()
        function = deq_compile(lambda x: plain(x), **loose)
        outer.forward = lambda x: Outer.forward(outer, function(x))  # type: ignore[method-assign]
    run = torch.compile(outer, backend="deq", options={"tol": 1e-6, "inner": "eager"}, fullgraph=True)
    with record_solves() as solves:
        run(torch.randn(3, 16))
    assert len(solves) == 2
    assert 1e-6 < solves[0].residual <= 1e-2
    assert solves[1].residual <= 1e-6


def test_explain() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.drop = Linear(), nn.Dropout(0.5)
            contract(self)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(40):
                z = self.f(z, x)
            for _ in range(7):
                z = self.drop(torch.tanh(z))
            return z

    report = explain(Two(), inner="eager")(torch.randn(3, 16))
    (region,) = report.regions
    assert (region.status, region.iterations, region.kind, region.hoisted) == ("solve", 40, "loop of 40", ("linear",))
    assert region.location.file == __file__ or region.location.file.endswith("parts.py")
    assert region.distance is not None
    (skipped,) = report.skipped
    assert skipped.reason is Reason.RANDOM
    assert skipped.location.file == __file__
    text = str(report)
    assert "float32[3,16]" in text
    assert f"{__file__}:{skipped.location.line}: RANDOM" in text
    assert json.loads(report.to_json())["skipped"][0]["reason"] == "RANDOM"
    assert set(report.seconds) >= {"find_loops", "judge", "replace"}


def test_explain_names_graph_breaks() -> None:
    model = Decorated()

    def broken(x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return Decorated.forward(model, x)

    report = explain(broken, inner="eager")(torch.randn(2, 16))
    assert (report.graphs, len(report.regions), len(report.graph_breaks)) == (2, 1, 1)
    assert "graph break " in str(report)


def test_explain_a_decorated_model_with_its_own_options() -> None:
    model = Decorated()
    report = explain(model)(torch.randn(3, 16))
    assert len(report.regions) == 1
    assert report.regions[0].status == "solve"


def test_records_without_listeners_cost_nothing_and_nest() -> None:
    model, x = Decorated(), torch.randn(3, 16)
    model(x)
    with record_solves() as outer:
        model(x).sum().backward()
        with record_solves(tensors=True) as inner:
            model(x).sum().backward()
    assert (len(outer), len(inner)) == (2, 1)
    assert outer[1].z is None
    assert inner[0].z is not None
    assert inner[0].w is not None
    assert inner[0].w.shape == (3, 16)
    assert all(s.vjps is not None and s.adjoint_residual is not None for s in (*outer, *inner))


def test_unknown_option() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'tolerance'.*did you mean 'tol'"):
        deq_compile(tolerance=1e-3)
    run = torch.compile(Loop(Linear()), backend="deq", options={"sovler": "picard"})
    with pytest.raises(Exception, match=r"unknown option 'sovler'.*did you mean 'solver'"):
        run(torch.randn(2, 16))


def test_wrong_target() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module class, an nn\.Module or a function"):
        deq_compile(3)


def test_mode_is_translated(inductor: object) -> None:
    with pytest.raises(Exception, match="Unrecognized mode"):
        torch.compile(nn.Linear(2, 2), backend="deq", mode="fastest")(torch.randn(1, 2))


def test_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="deq_compile"):
        explain(Decorated())(torch.randn(2, 16))
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("deq_compile")]
    assert any("40 iterations" in m for m in messages)
    assert any("solve" in m for m in messages)


SCRIPT = """
import torch
torch.manual_seed(0)
f = torch.nn.Linear(4, 4)
f.weight.data *= 0.3
def loop(x):
    z = torch.zeros_like(x)
    for _ in range(20):
        z = torch.tanh(f(z) + x)
    return z
x = torch.randn(2, 4)
torch.testing.assert_close(torch.compile(loop, backend="deq", options={"inner": "%s"})(x), loop(x), rtol=1e-3, atol=1e-4)
"""
# TORCH_LOGS imports what it names; a trace must not.
UNIMPORTED = """
import sys, torch
assert not any(name.split(".")[0] == "deq_compile" for name in sys.modules)
"""
KEYS = """
import torch, deq_compile
f = torch.nn.Linear(4, 4)
def loop(x):
    z = torch.zeros_like(x)
    for _ in range(20):
        z = torch.tanh(0.1 * f(z) + x)
    return z
print([r.key for r in deq_compile.explain(loop, inner="eager")(torch.ones(2, 4)).regions])
from deq_compile.config import Options
print(Options(factor_dtype="bfloat16", inductor={"dce": 1, "comment_origin": [2]}, backward_tol=float("inf")).resolve().key())
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


# A process costs seconds before its first line, so each of these serves several tests.


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """torch.compile by name where nothing has imported the package, and the folder of the structured trace."""
    traces = tmp_path_factory.mktemp("traces")
    return python(UNIMPORTED + SCRIPT % "eager", TORCH_TRACE=str(traces)), traces


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    code = "import deq_compile\n" + SCRIPT % "inductor" + KEYS
    cache = str(tmp_path_factory.mktemp("inductor"))
    return python(code, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=cache, PYTHONHASHSEED="1")


@pytest.fixture(scope="module")
def plain_checkout() -> subprocess.CompletedProcess[str]:
    """No distribution metadata, hence no entry point."""
    hide = """
import importlib.metadata as metadata
real = metadata.entry_points
def without(**query):
    found = real(**query)
    if "group" not in query:
        return found
    return metadata.EntryPoints(e for e in found if e.name != "deq")
metadata.entry_points = without
import deq_compile
"""
    return python(hide + SCRIPT % "eager" + KEYS, PYTHONPATH=str(ROOT), PYTHONHASHSEED="2")


def test_backend_is_found_without_import(by_name: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Through the entry point of the installed package."""
    done, _ = by_name
    assert done.returncode == 0, done.stderr


def test_torch_logs() -> None:
    done = python(SCRIPT % "eager", TORCH_LOGS="+deq_compile")
    assert done.returncode == 0, done.stderr
    assert "find_loops" in done.stderr


def test_rewritten_graph_is_in_the_structured_trace(by_name: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, traces = by_name
    assert done.returncode == 0, done.stderr
    (log,) = traces.iterdir()
    text = log.read_text()
    assert "deq_rewritten_graph" in text
    assert "torch.ops.deq.solve.default" in text


def test_without_a_compiler(no_compiler: subprocess.CompletedProcess[str]) -> None:
    """One warning, then aot_eager."""
    assert no_compiler.returncode == 0, no_compiler.stderr
    assert no_compiler.stderr.count("no C++ compiler was found") == 1
    assert "inner='aot_eager'" in no_compiler.stderr


def test_backend_is_registered_on_import_of_a_plain_checkout(plain_checkout: subprocess.CompletedProcess[str]) -> None:
    """No distribution metadata, hence no entry point: the import registers the backend."""
    assert plain_checkout.returncode == 0, plain_checkout.stderr


def test_keys_are_the_same_in_every_process(
    no_compiler: subprocess.CompletedProcess[str], plain_checkout: subprocess.CompletedProcess[str]
) -> None:
    """Whatever the seed of Python's hashes."""
    first, second = no_compiler.stdout, plain_checkout.stdout
    assert first == second
    assert "-0']" in first


def test_this_machine_has_a_compiler() -> None:
    assert has_cpp_compiler()


def test_version() -> None:
    assert dq.__version__ in (ROOT / "pyproject.toml").read_text()


def test_key_of_options_is_the_same_in_another_process(no_compiler: subprocess.CompletedProcess[str]) -> None:
    here = Options(factor_dtype=torch.bfloat16, inductor={"comment_origin": [2], "dce": 1}, backward_tol=math.inf).resolve().key()
    assert no_compiler.stdout.splitlines()[-1] == here
    assert len(here) == 16
