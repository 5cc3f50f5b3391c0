"""Self-tests that were passed are not run again, by processes in which nothing has changed that they show."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deq_compile.capture import proven
from tests.fresh import python

PROGRAM = """
import torch
from deq_compile.capture import self_tests, OFF
count, traced = 0, self_tests._targets
def counting(*args, **kwargs):
    global count
    count += 1
    return traced(*args, **kwargs)
self_tests._targets = counting
{damage}
import deq_compile.backend, json
print(json.dumps([count, len(OFF)]))
"""
OTHERS = (
    "from torch._dynamo.variables.tensor import TensorVariable\n"
    "real = TensorVariable.call_method\n"
    "TensorVariable.call_method = lambda self, *args, **kwargs: real(self, *args, **kwargs)"
)
BROKEN = (
    "import importlib\n"
    "def fails(): raise RuntimeError('as on another torch')\n"
    "features = importlib.import_module('deq_compile.capture.install')._FEATURES\n"
    "next(f for f in features if f.name == 'sparse matrices').__dict__['test'] = fails"
)


def run(folder: Path, damage: str = "") -> list[int]:
    """How many programs self-tests have traced, and how many features are off."""
    done = python(PROGRAM.format(damage=damage), "dynamo", DEQ_COMPILE_CACHE_DIR=str(folder))
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "own"
    made.mkdir(mode=0o700)
    return made


def test_what_was_passed_is_not_run_again(folder: Path) -> None:
    first, off = run(folder)
    assert (first > 5, off) == (True, 0)
    assert run(folder) == [0, 0]
    assert run(folder, OTHERS) == [first, 0]  # somebody has changed a method of Dynamo's
    (note,) = folder.glob("deq_compile_capture_*")
    assert note.stat().st_size == 0


def test_what_has_failed_is_run_again(folder: Path) -> None:
    count, off = run(folder, BROKEN)
    assert (count > 5, off) == (True, 1)
    assert not list(folder.glob("deq_compile_capture_*"))


def test_who_changes_dynamo_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function, a class, and a method from a package whose name begins as torch's does."""
    module = ModuleType("torch._dynamo.made_up")
    monkeypatch.setattr(proven, "_modules", lambda: [module])

    class Kept:
        def method(self) -> None: ...

    Kept.__module__ = module.__name__
    torchs = f"{Path(torch.__file__).parent}/_dynamo/made_up.py"
    Kept.method.__code__ = Kept.method.__code__.replace(co_filename=torchs)
    module.Kept = Kept  # type: ignore[attr-defined]
    assert not proven._changed()
    Kept.method.__code__ = Kept.method.__code__.replace(co_filename=torchs.replace("/torch/", "/torchother/"))
    assert proven._changed()
    del module.Kept
    assert not proven._changed()
    module.replaced = lambda: None  # type: ignore[attr-defined]
    assert proven._changed()


def test_nothing_is_noted_where_others_may_write_or_tests_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "_changed", lambda: False)  # by now it has been changed by us
    monkeypatch.setenv("DEQ_COMPILE_CACHE_DIR", str(folder))
    note = proven.note()
    assert note is not None
    assert note == proven.note()
    monkeypatch.setenv(proven.VARIABLE, "1")
    assert proven.note() is None
    monkeypatch.delenv(proven.VARIABLE)
    folder.chmod(0o777)
    assert proven.note() is None
