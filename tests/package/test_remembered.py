"""Hashes that Inductor makes in every process are taken from an earlier one, where the files are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from deq_compile import torch_parts
from deq_compile.kernels import folder, remembered


class Hash:
    """What Inductor has: a function that makes a value once, or is told it."""

    def __init__(self, value: Any) -> None:
        self.value, self.made = value, 0
        self.told: Any = None

    def __call__(self) -> Any:
        if self.told is None:
            self.made += 1
            return self.value
        return self.told

    def set(self, value: Any) -> None:
        self.told = value


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that the hashes are of, in a folder of their own."""
    found = [tmp_path / name for name in ("one.py", "libtriton.so")]
    for file in found:
        file.write_text("x")
    monkeypatch.setattr(remembered, "_files", lambda: iter(found))
    monkeypatch.setattr(remembered, "_missing", None)
    monkeypatch.setattr(folder, "private", lambda: tmp_path)
    return found


def process(monkeypatch: pytest.MonkeyPatch, triton: Any = "triton") -> tuple[Hash, Hash]:
    """The hashes of a new process."""
    hashes = Hash(b"\x00inductor"), Hash(triton)
    for name, function in zip(("hash_of_inductor", "hash_of_triton"), hashes, strict=True):
        monkeypatch.setattr(torch_parts, name, function, raising=False)
    remembered.recall()
    return hashes


def kept(folder: Path) -> list[Path]:
    return list(folder.glob("deq_compile_hashes_*"))


def test_the_next_process_has_them(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch)
    assert not kept(tmp_path)
    remembered.keep()
    remembered.keep()
    assert len(kept(tmp_path)) == 1
    assert kept(tmp_path)[0].stat().st_mode & 0o077 == 0
    one, other = process(monkeypatch)
    assert (one(), other()) == (b"\x00inductor", "triton")
    assert (one.made, other.made) == (0, 0)


def test_without_triton(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, triton=None)
    remembered.keep()
    assert process(monkeypatch, triton=None)[0].told == b"\x00inductor"


def test_another_file_makes_others(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch)
    remembered.keep()
    facts = files[1].stat()
    os.utime(files[1], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1000))
    assert process(monkeypatch)[0].told is None
    files[1].write_text("longer")
    os.utime(files[1], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert process(monkeypatch)[0].told is None


def test_what_cannot_be_read_is_made_again(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch)
    remembered.keep()
    (file,) = kept(tmp_path)
    half, wrong = {"inductor": ["bytes", "00"]}, {"inductor": 3, "triton": ["bytes", "xy"]}
    for text in ("", "{", "[]", "7", json.dumps(half), json.dumps(wrong)):
        file.write_text(text)
        assert process(monkeypatch)[0].told is None
    monkeypatch.setattr(folder, "private", lambda: (_ for _ in ()).throw(PermissionError("nobody's")))
    assert process(monkeypatch)[0].told is None


def test_they_are_inductors_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written and read again is what Inductor's function returns, and its files are among those that are looked at."""
    value = torch_parts.hash_of_inductor()
    assert remembered._read(json.loads(json.dumps(remembered._written(value)))) == value
    names = {file.name for file in remembered._files()}
    assert {"codecache.py", "interface.cpp"} <= names
    assert all(hasattr(function, "set") for function in remembered._hashes().values())
