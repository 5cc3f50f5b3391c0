"""`python -m deq_compile`, and what a first user meets on a machine that lacks something: one sentence, with the fix."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import demo
from deq_compile import capture, doctor, inner, ready, torch_parts
from deq_compile.doctor import Finding, Level
from deq_compile.kernels import native
from tests.fresh import python

ROOT = Path(__file__).resolve().parents[2]


def test_everything_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    """In the order in which one thing needs another; this machine lacks nothing that would be broken."""
    assert doctor.main(["--quick"]) == 0
    said = capsys.readouterr().out
    about = [line[9:21].strip() for line in said.splitlines() if line.startswith(("ok ", "limited "))]
    order = ["deq_compile", "python", "torch", "triton", "C++ compiler", "C++ kernels", "GPU", "features", "model, cpu"]
    assert [name for name in about if name in order] == order
    assert "value and gradient differ from eager's by" in said
    assert all(name in said for name in capture.features() if name not in capture.OFF)


class Found:
    def __init__(self, *levels: Level) -> None:
        self.levels = levels

    def __call__(self, how: str) -> Iterator[Finding]:
        return (Finding("a look", "something", level, "do it") for level in self.levels)


@pytest.mark.parametrize(
    ("levels", "plain", "strict"),
    [((Level.OK,), 0, 0), ((Level.OK, Level.LIMITED), 0, 1), ((Level.BROKEN, Level.LIMITED), 1, 1)],
)
def test_the_exit_status(
    levels: tuple[Level, ...], plain: int, strict: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", Found(*levels))
    assert doctor.main([]) == plain
    assert doctor.main(["--strict"]) == strict
    assert "Fix: do it" in capsys.readouterr().out


def test_a_look_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Iterator[Finding]:
        yield Finding("first", "fine")
        raise RuntimeError("no such luck")

    found = list(doctor._looked(fails, "a look"))
    assert [finding.level for finding in found] == [Level.OK, Level.BROKEN]
    assert "RuntimeError: no such luck" in str(found[1])


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "no_cpp_compiler", lambda: "Fix: install one")
    (found,) = doctor.compiler()
    assert (found.level, found.fix) == (Level.LIMITED, "install one")


@pytest.mark.parametrize(("platform", "fix"), [("linux", "g++"), ("darwin", "xcode-select"), ("win32", "developer prompt")])
def test_a_compiler_that_inductor_does_not_find(platform: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise torch_parts.InvalidCxxCompiler()

    monkeypatch.setattr(torch_parts, "get_cpp_compiler", none)
    monkeypatch.setattr(sys, "platform", platform)
    assert fix in inner.no_cpp_compiler()


def test_a_compiler_that_inductor_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> str:
        raise RuntimeError("Torch inductor is only supported in English\nand more")

    monkeypatch.setattr(torch_parts, "get_cpp_compiler", refused)
    assert inner.no_cpp_compiler().startswith("Inductor says: Torch inductor is only supported in English Fix: ")
    (found,) = doctor.compiler()
    assert found.says.endswith("Inductor says: Torch inductor is only supported in English")
    assert "CXX" in found.fix


def test_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    native._load.cache_clear()
    try:
        monkeypatch.setenv("DEQ_COMPILE_NATIVE", "0")
        (found,) = doctor.kernels()
        assert (found.level, found.fix) == (Level.LIMITED, "unset DEQ_COMPILE_NATIVE")
        monkeypatch.delenv("DEQ_COMPILE_NATIVE")
        native._load.cache_clear()
        monkeypatch.setattr(native, "source", lambda: "this is no C++")
        (found,) = doctor.kernels()
        assert found.level is Level.LIMITED
        assert "ATen serves" in found.says
    finally:
        native._load.cache_clear()


def test_a_build_for_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        warnings.warn("CUDA initialization: no driver", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    (found,) = doctor.gpu()
    assert found.level is Level.OK
    assert "none is seen (CUDA initialization: no driver): everything runs on the CPU" in found.says


def test_what_is_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(capture.OFF, "TorchDEQ", "torch 9 has no such name")
    found = {finding.says: finding.level for finding in doctor.features()}
    assert found["TorchDEQ: torch 9 has no such name"] is Level.LIMITED
    assert "TorchDEQ," not in next(iter(found))
    monkeypatch.setitem(capture.OFF, torch_parts.REGIONS, "nothing is left")
    assert Level.BROKEN in {finding.level for finding in doctor.features()}


def test_a_model_that_differs_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    step = doctor._step

    def other(model: Any, call: Any, x: Any) -> Any:
        value, gradient = step(model, call, x)
        return [value, gradient if call is model else 1.1 * gradient]

    monkeypatch.setattr(doctor, "_step", other)
    (found,) = [finding for finding in doctor.models("eager") if finding.about == "model, cpu"]
    assert found.level is Level.BROKEN
    assert "1e-01" in found.says


def test_a_model_without_a_region_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Model, "forward", lambda self, x: torch.tanh(self.W(x) + self.U(x)))
    (found,) = [finding for finding in doctor.models("eager") if finding.about == "model, cpu"]
    assert found.level is Level.BROKEN
    assert "expected one solve, got no region" in found.says


def test_inductor_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    run = doctor._run

    def fails(device: str, how: str) -> Finding:
        if how != "eager":
            raise RuntimeError("the compiler crashed\nmore")
        return run(device, how)

    monkeypatch.setattr(doctor, "_run", fails)
    (found,) = [finding for finding in doctor.models("inductor") if finding.about == "model, cpu"]
    assert found.level is Level.BROKEN
    assert "Inductor cannot compile here" in found.fix


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("2.9.1", (2, 9)),
        ("2.11.0a0+git1f2e", (2, 11)),
        ("3.0.0.dev20270101", (3, 0)),
        ("parrot", (0, 0)),
    ],
)
def test_versions_of_torch(text: str, version: tuple[int, int]) -> None:
    assert ready.version_of(text) == version


@pytest.mark.parametrize("version", ["2.10.0+cu128", "1.13.1"])
def test_an_old_torch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(
        ImportError, match=rf"expected torch 2.11 or newer, got torch {version[:4]}.*Fix: pip install -U 'torch>=2.11'"
    ):
        ready.check_torch()


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"torch>=2\.11|halted"):
        ready.check_torch()


def test_folders_beside_the_package_are_found(tmp_path: Path) -> None:
    """Where a checkout has text files for links; both folders at one place of the path."""
    package, path = tmp_path / "deq_compile", ["first"]
    package.mkdir()
    for name in ready.LINKED:
        (package / name).write_text(f"../{name}")
    with pytest.raises(ImportError, match=r"expected a folder .* got neither. Fix: "):
        ready.find_linked(package, path)
    for name in ready.LINKED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    ready.find_linked(package, path)
    assert path == ["first", str(tmp_path)]


def test_an_old_torch_is_told_by_name_too() -> None:
    """Without an import of ours: torch finds the backend through the entry point of the installed package."""
    code = "import torch; torch.__version__ = '2.10.0'; torch.compile(lambda x: x, backend='deq')(torch.ones(1))"
    done = python(code, "dynamo")
    assert done.returncode != 0
    assert "ImportError: deq_compile: expected torch 2.11 or newer, got torch 2.10.0. Fix: " in done.stderr


WINDOWS = """
import os, sys, types
import torch, torch._inductor.compile_fx, torch._inductor.cpp_builder as builder
for name in ("geteuid", "getegid", "sched_getaffinity", "fork"):
    delattr(os, name)
builder._IS_WINDOWS = True
from deq_compile import doctor, inner
inner.sys = types.SimpleNamespace(platform="win32")
sys.exit(doctor.main([]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux plays Windows")
def test_as_on_windows_without_a_compiler() -> None:
    """No owners of files, no fork, no cl: aot_eager and ATen serve, and the small model is right."""
    done = python(WINDOWS, "dynamo", DEQ_COMPILE_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "(inner='aot_eager')" in done.stdout
    assert "developer prompt of Visual Studio" in done.stdout
    assert "Nothing is broken; 2 limited" in done.stdout


def test_the_demo_says_what_a_row_needs() -> None:
    assert demo.explained("a traceback\nInductorError: InvalidCxxCompiler: No working") == (
        "it needs a C++ compiler, and none was found. Fix: install g++ or clang++, or set CXX"
    )
    assert demo.explained("ValueError: x") == "ValueError: x"


def test_make_without_a_network(tmp_path: Path) -> None:
    """One sentence below pip's own words, and no environment that passes for a whole one."""
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\necho 'ERROR: no index' >&2\nexit 1\n")
    fake.chmod(0o755)
    command = ["make", "demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"make: expected pip to install the development set into {tmp_path / 'venv'}; it failed" in done.stdout
    assert "fix: without a network, name a package index" in done.stdout
    assert not (tmp_path / "venv" / ".installed").exists()
