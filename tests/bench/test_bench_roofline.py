"""``python -m bench roofline``: counts by hand, caches, the loops themselves, and a tiny run that is interrupted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.roofline import ceilings, cli, counts, measure, outputs, subjects
from bench.roofline.ceilings import Loops, Rates, Speeds, cache_sizes, floor, level_of
from bench.roofline.counts import Count, Stream
from bench.roofline.subjects import Shape
from deq_compile.kernels import broyden, gcr


@pytest.fixture(scope="module")
def loops() -> Loops:
    return Loops.load(1 << 20)


def test_bytes_and_flops_by_hand() -> None:
    # words an element, flops an element, words and flops a sample
    expected = {
        counts.step: (3 + (3 + 1) + (2 + 5), 5 + 4 * 3 + 2 * 2 + 2, 3 + 16, 2 * 9),  # C: rows of 1 and 2, one row of 16 written
        counts.move: (3 + 7 + 2 * (3 + 1) + 2 * (3 + 3) + (3 + 11), 6 + 8 + 2 * (2 * 3 + 2 * 3 + 4) + 2 * 3 + 7, 0, 0),
        counts.make: (1 + 2 + 3, 2 * 6, 2 + 3 * 16, 9 * 27),
        counts.apply: (2 + (3 + 1) + (3 + 2), 2 * 3 + 2 * 3 + 1, 9, 2 * 9),
    }
    for count, (words, flops, small, small_flops) in expected.items():
        found = count(2, 1000, 3)
        assert found.moved == 4 * (2000 * words + 2 * small), count.__name__
        assert found.flops == 2000 * flops + 2 * small_flops, count.__name__


def test_the_step_s_working_set_is_its_buffers() -> None:
    z = torch.zeros(2, 1000)
    state = broyden.new_state(z, 3)  # S has room for the three steps and for the new one
    buffers = [state.S, state.z_best, z, z]  # z and f are of one size
    C = 4 * 2 * (3 + 16)
    assert counts.step(2, 1000, 3).working_set == sum(t.numel() * t.element_size() for t in buffers) + C


def test_a_floor_adds_transfers_and_hides_the_smaller_part() -> None:
    # 4 GB read and 1 made: 2 GB copied, 3 read; used again: 2 GB read, 1 updated
    count = Count(Stream(4e9, 1e9, 0, 0), Stream(2e9, 0, 1e9, 0), 1e9)
    rates = Rates(Speeds(10.0, 4.0, 1.0), Speeds(20.0, 1.0, 5.0), gflops=100.0)
    assert floor(count, rates) == pytest.approx(3 / 10 + 2 / 4 + 2 / 20 + 1 / 5)
    assert floor(count, replace(rates, gflops=0.5)) == pytest.approx(2.0)
    assert floor(Count(Stream(1e9, 3e9, 0, 0), Stream(0, 0, 0, 0), 0), rates) == pytest.approx(4 / 4)


def test_caches_are_those_of_data_and_may_be_unknown(tmp_path: Path) -> None:
    for index, (kind, level, size) in enumerate([("Unified", 3, "2M"), ("Instruction", 1, "64K"), ("Data", 1, "48K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    caches = cache_sizes(tmp_path)
    assert list(caches.items()) == [("L1", 48 << 10), ("L3", 2 << 20)]
    assert [level_of(size, caches) for size in (1, 48 << 10, (48 << 10) + 1, 3 << 20)] == ["L1", "L1", "L3", "memory"]
    assert cache_sizes(tmp_path / "absent") == {}
    assert level_of(1, {}) == "unknown"


def test_the_loops_touch_all_of_a_set(loops: Loops) -> None:
    at, length = loops.buffer.data_ptr(), loops.stream(0)
    size, numbers = 8 * length, torch.arange(8.0 * length)
    loops.buffer[:size] = numbers
    assert loops.library.read_set(at, length, 1) == pytest.approx(size * (size - 1) / 2, rel=1e-6)
    loops.library.update_set(at, length, 3)
    torch.testing.assert_close(loops.buffer[:size], -numbers, rtol=0, atol=0)
    loops.library.copy_set(at, length, 1)
    torch.testing.assert_close(loops.buffer[4 * length : size], numbers[: 4 * length], rtol=0, atol=0)
    loops.buffer.fill_(1)
    assert 8 * loops.stream(1e12) <= loops.buffer.numel()


@pytest.mark.parametrize("shape", [Shape(2, 33, 3), Shape(1, 1, 5)])
def test_what_is_timed_again_is_the_same_call(shape: Shape) -> None:
    names = []
    for subject in subjects.subjects(shape):
        names.append(subject.name)
        given = [cell.cell_contents for cell in subject.call.__closure__ or ()]
        tensors = [x.w if isinstance(x, gcr.GcrState) else x for x in given if isinstance(x, gcr.GcrState | torch.Tensor)]
        seen = []
        for _ in range(2):
            subject.reset()
            subject.call()
            seen.append([t.clone() for t in tensors])
        torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert names == (["step", "make", "apply", "move"] if shape.n < shape.D else ["step", "make", "apply"])


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(given)


def test_an_interrupted_run_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], loops: Loops
) -> None:
    rows = measure.rows

    def interrupted(*args: Any) -> Iterator[measure.Row]:
        for row in rows(*args):
            yield row
            if row["kernel"] == "step" and row["n"] == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(measure, "rows", interrupted)
    monkeypatch.setattr(cli, "shapes", lambda quick: [Shape(1, 1, 1), Shape(2, 33, 3), Shape(2, 33, 4)])
    monkeypatch.setattr(Loops, "load", lambda largest: loops)
    stored, picture = tmp_path / "a.json", tmp_path / "a.png"
    assert cli.main(arguments("--quick", "--repeats", "1", "--out", str(stored))) == 130
    found = json.loads(stored.read_text())
    assert {"machine", "date", "versions", "commit", "caches", "curve", "gflops", "rows"} <= set(found)
    assert [(row["kernel"], row["D"], row["n"]) for row in found["rows"]] == [("step", 1, 1), ("step", 33, 3)]
    for row in found["rows"]:
        measured = ("hot_us", "cold_us", "hot_floor_us", "cold_floor_us", "arithmetic_us", "bytes", "flops", "set_bytes")
        assert all(row[name] > 0 for name in measured)
    assert found["curve"][0]["bytes"] == ceilings.SMALLEST
    capsys.readouterr()
    assert cli.main(arguments("--show", str(stored), "--markdown", "--plot", str(picture))) == 0
    assert "2 x 33 |" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    monkeypatch.setattr(outputs, "BRIEF_STEPS", 3)
    assert cli.main(arguments("--show", str(stored), "--brief")) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["2", "x", "33"]  # 1 x 1 was not measured at 3 steps


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(SystemExit, match="step, move, make, apply; got solve"):
        cli.main(arguments("--kernels", "solve"))
