"""The hash of Triton that Inductor makes in every process is taken from an earlier one, where the files are the same."""

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

    def __init__(self) -> None:
        self.made = 0
        self.told: Any = None

    def __call__(self) -> Any:
        if self.told is None:
            self.made += 1
            return "triton"
        return self.told

    def set(self, value: Any) -> None:
        self.told = value


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that the hash is of, in a folder of their own."""
    found = [tmp_path / name for name in ("one.py", "libtriton.so")]
    for file in found:
        file.write_text("x")
    monkeypatch.setattr(remembered, "_files", lambda: iter(found))
    monkeypatch.setattr(remembered, "_missing", None)
    monkeypatch.setattr(folder, "private", lambda: tmp_path)
    return found


def process(monkeypatch: pytest.MonkeyPatch) -> Hash:
    """The hash of a new process."""
    found = Hash()
    monkeypatch.setattr(remembered, "_hash", lambda: found)
    remembered.recall()
    return found


def kept(folder: Path) -> list[Path]:
    return list(folder.glob("deq_compile_triton_*"))


def test_the_next_process_has_it(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch)
    assert not kept(tmp_path)
    remembered.keep()
    remembered.keep()
    assert len(kept(tmp_path)) == 1
    assert kept(tmp_path)[0].stat().st_mode & 0o077 == 0
    later = process(monkeypatch)
    assert later() == "triton"
    assert later.made == 0


def test_another_file_makes_another(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch)
    remembered.keep()
    facts = files[1].stat()
    os.utime(files[1], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1000))
    assert process(monkeypatch).told is None
    files[1].write_text("longer")
    os.utime(files[1], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert process(monkeypatch).told is None


def test_what_cannot_be_read_is_made_again(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch)
    remembered.keep()
    (file,) = kept(tmp_path)
    for text in ("", "{", "[]", "[1]", "7", "{}", '{"triton": null}', '{"triton": 3}', '{"triton": ""}'):
        file.write_text(text)
        assert process(monkeypatch).told is None
    remembered.keep()
    assert json.loads(file.read_text()) == {"triton": "triton"}
    monkeypatch.setattr(folder, "private", lambda: (_ for _ in ()).throw(PermissionError("nobody's")))
    assert process(monkeypatch).told is None


def test_its_files_are_all_that_triton_hashes() -> None:
    """Of its own folder: what `triton_key` opens."""
    cache = pytest.importorskip("triton.runtime.cache")
    opened, root = [], Path(cache.__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:

        def note(file: Any, *args: Any, **kwargs: Any) -> Any:
            opened.append(Path(file))
            if Path(file).suffix == ".so":  # half a gigabyte
                file = __file__
            return open(file, *args, **kwargs)

        patch.setattr(cache, "open", note, raising=False)
        cache.triton_key.__wrapped__()
    assert {file.resolve() for file in opened if root in file.parents} <= {file.resolve() for file in remembered._files()}
    assert any(file.suffix == ".so" for file in opened)


def test_the_hash_of_torch_is_not_remembered() -> None:
    """It is of two thousand files, and a key that misses an edited one is old code in silence."""
    assert not hasattr(torch_parts, "hash_of_inductor")
