"""Tuned tiles: used where they fit, ignored where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from deq_compile.kernels import tuned
from deq_compile.kernels.tiles import by_shape, tiles


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DEQ_COMPILE_TILES", str(tmp_path / "folder" / "tiles.json"))
    tuned.forget()
    yield tmp_path / "folder" / "tiles.json"
    tuned.forget()


def test_what_was_tuned_is_used(file: Path) -> None:
    plain = by_shape(32, 65536, 41)
    better = dataclasses.replace(plain, stages=2, warps=8)
    assert tiles(32, 65536, 41) == plain
    assert tuned.save({tuned.key(32, 65536, 41, 4): dataclasses.asdict(better)}) == file
    assert tiles(32, 65536, 41) == better
    assert tiles(31, 65536, 41) == by_shape(31, 65536, 41)
    tuned.save({tuned.key(1, 100, 9, 4): dataclasses.asdict(by_shape(1, 100, 9))})
    assert tiles(32, 65536, 41) == better


@pytest.mark.parametrize("change", [{"slab": 16}, {"slabs": 1}, {"BM": 8}, {"warps": None, "nonsense": 3}])
def test_what_does_not_fit_is_not(file: Path, change: dict[str, int]) -> None:
    values = {**dataclasses.asdict(by_shape(32, 65536, 41)), **change}
    tuned.save({tuned.key(32, 65536, 41, 4): values})
    assert tiles(32, 65536, 41) == by_shape(32, 65536, 41)


@pytest.mark.parametrize("text", ["[1, 2]", "not json"])
def test_a_broken_file_is_told_and_ignored(file: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert tiles(32, 65536, 41) == by_shape(32, 65536, 41)
    assert "tuned tiles are ignored" in caplog.text


@pytest.mark.parametrize("D", [1, 127, 128, 129, 1000, 1024])
def test_a_short_row_is_one_tile_of_the_update(D: int) -> None:
    """Its loads of steps then wait for nothing but each other; a longer row takes several tiles of the widest kind."""
    for steps in (2, 11, 41):
        cut = by_shape(128, D, steps)
        assert cut.slabs == 1
        assert cut.BD2 >= D
        assert by_shape(128, 1025, steps).BD2 == by_shape(128, 1024, steps).BD2
