"""The compiled C++ library lies where nobody else can put another."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from deq_compile import inner
from deq_compile.kernels import folder, native

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")


def test_a_new_folder_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(folder.VARIABLE, str(tmp_path / "deep" / "own"))
    found = folder.private()
    assert found == tmp_path / "deep" / "own"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert folder.private() == found  # and stays so


@pytest.mark.parametrize("mode", [0o722, 0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_to(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a sticky bit forbids them to change what is there: they may add."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own").chmod(mode)
    monkeypatch.setenv(folder.VARIABLE, str(tmp_path / "own"))
    with pytest.raises(PermissionError, match=r"others may write to .*Fix: set DEQ_COMPILE_CACHE_DIR to a folder"):
        folder.private()


def test_a_folder_in_one_that_others_may_write_to(tmp_path: Path) -> None:
    """They could put another in its place, unless the sticky bit is set, as on /tmp."""
    (tmp_path / "open" / "own").mkdir(parents=True)
    (tmp_path / "open" / "own").chmod(0o700)
    (tmp_path / "open").chmod(0o757)
    assert folder.distrusted(tmp_path / "open" / "own") == f"others may write to {tmp_path / 'open'} (mode 757)"
    (tmp_path / "open").chmod(0o1777)
    assert folder.distrusted(tmp_path / "open" / "own") == ""


def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_user", lambda: os.geteuid() + 1)
    assert folder.distrusted(tmp_path) == f"{tmp_path} belongs to user {os.geteuid()}"


def test_a_link_and_a_file_are_no_folders(tmp_path: Path) -> None:
    """What a link points to may change."""
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "file").touch()
    assert folder.distrusted(tmp_path / "link").endswith("is no folder")
    assert folder.distrusted(tmp_path / "file").endswith("is no folder")


def test_the_next_candidate_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's cache as torch makes it; one for a group; one that everybody may write to; one made by somebody else first."""
    cache, home = tmp_path / "inductor", tmp_path / "home"
    cache.mkdir(mode=0o755)
    monkeypatch.delenv(folder.VARIABLE, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert folder.private() == cache
    cache.chmod(0o775)
    inside = folder.private()
    assert inside.parent == cache
    assert stat.S_IMODE(inside.stat().st_mode) == 0o700
    cache.chmod(0o777)
    assert folder.private() == home / "deq_compile"
    cache.chmod(0o755)
    monkeypatch.setattr(folder, "_user", lambda: os.geteuid() + 1)
    with pytest.raises(PermissionError, match="belongs to user"):
        folder.private()


def test_native_code_is_not_loaded_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppCodeCache

    def load(*args: Any, **kwargs: Any) -> Any:
        loads.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        raise RuntimeError("seen")

    loads: list[str] = []
    monkeypatch.setattr(CppCodeCache, "load", load)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(folder.VARIABLE, str(tmp_path / "own"))
    native._load.cache_clear()
    try:
        assert native._load() is None
        assert loads == [str(tmp_path / "own")]
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
        (tmp_path / "own").chmod(0o777)
        native._load.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert native._load() is None
        assert len(loads) == 1
        assert "no C++ kernels, going on with ATen" in caplog.text
        assert "set DEQ_COMPILE_CACHE_DIR" in caplog.text
        monkeypatch.undo()
    finally:
        native._load.cache_clear()
    assert native.functions(torch.zeros(2)) is None or native.folder.distrusted(folder.private()) == ""


def test_a_cache_of_inductors_that_others_may_write_to_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        inner.say_whose_cache.__wrapped__()
        assert caplog.text == ""
        tmp_path.chmod(0o777)
        inner.say_whose_cache.__wrapped__()
    assert "others may write to" in caplog.text
    assert "Fix: set TORCHINDUCTOR_CACHE_DIR" in caplog.text
