"""What can be read off the compiled kernels without a GPU: barriers, conditions, alignment and size of what they are given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "aten":
        pytest.skip("no matter of the CPU implementation")


def ttgir(name: str, graph: bool) -> str:
    """The last form of a kernel that still has pointers, for sm_90."""
    from bench.kernels import compiled, kernels

    return str(compiled(name, kernels()[name], 90, "fp32", 41, graph).asm["ttgir"])


def races(text: str) -> list[str]:
    """Arguments of a kernel that are read as one number, by every warp for itself, and written later with no barrier between.

    A warp that is late would read what another has written already, and go another way than that.
    """
    root: dict[str, str] = {}
    read: set[str] = set()
    found = []
    for line in text.splitlines():
        if made := re.match(r"\s*(%\S+) = tt\.addptr (%\S+),.*: !tt\.ptr", line):
            root[made[1]] = root.get(made[2], made[2])
        elif loaded := re.match(r"\s*%\S+ = tt\.load (%\S+?)[ ,:{].*: !tt\.ptr", line):
            read.add(root.get(loaded[1], loaded[1]))
        elif any(barrier in line for barrier in ("gpu.barrier", "ttg.local_barrier", "ttg.barrier")):
            read.clear()
        elif stored := re.match(r"\s*tt\.store (%\S+?), .*: !tt\.ptr", line):
            place = root.get(stored[1], stored[1])
            if place in read:
                found.append(place)
    return found


def test_the_reader_of_races_sees_one() -> None:
    text = """
      %9 = tt.addptr %count_ptr, %b : !tt.ptr<i32>, i64
      %10 = tt.load %9 : !tt.ptr<i32>
      BARRIER
      %11 = tt.addptr %count_ptr, %b : !tt.ptr<i32>, i64
      tt.store %11, %12 : !tt.ptr<i32>
    """
    assert races(text) == ["%count_ptr"]
    assert races(text.replace("BARRIER", "gpu.barrier")) == []


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_counters_are_not_written_while_they_are_read(graph: bool) -> None:
    from bench.kernels import _LONGS, kernels

    for name, kernel in kernels().items():
        if not graph or any(a in _LONGS for a in kernel.arg_names):
            text = ttgir(name, graph)
            assert "tt.load" in text or name == "addresses"
            assert races(text) == [], name


@pytest.mark.parametrize("B", range(1, 10))
def test_another_batch_size_compiles_nothing(B: int) -> None:
    """Triton specialises on alignment to 16 bytes: every counter of every batch has it."""
    from deq_compile.kernels.broyden.gpu import TritonState
    from deq_compile.kernels.broyden.state import new_factors
    from deq_compile.kernels.gcr.gpu import TritonGcr

    z0 = torch.zeros(B, 3)
    S, C = new_factors(z0, 4, torch.float32)
    step = TritonState.create(z0, S, C, eta=0.1, tol=1e-3, relative=True, floor=0.0, kernels=None)
    adjoint = TritonGcr.create(z0, None, 4, 1e-3, 0.0, None, begin=False)
    for state in (step, adjoint):
        tensors = {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
        assert {"done", "best", "mark", "stall", "iterations"} <= set(tensors)
        for name, value in tensors.items():
            assert value.data_ptr() % 16 == 0, (type(state).__name__, name)


def test_numbers_of_a_batch_are_not_specialised_on() -> None:
    from bench.kernels import kernels

    for name, kernel in kernels().items():
        free = {p.name for p in kernel.params if p.do_not_specialize}
        wanted = {"B", "PARTS", "SLABS", "max_iter", "skip"} & set(kernel.arg_names)
        assert wanted <= free | {p.name for p in kernel.params if p.is_constexpr}, name


def test_what_32_bit_offsets_cannot_reach_is_left_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """(M + 1) D of 2**31 and more: on meta tensors, of no size at all."""
    from deq_compile.kernels import broyden, gcr
    from deq_compile.kernels.broyden.gpu import TritonState
    from deq_compile.kernels.device import rehearsal
    from deq_compile.kernels.gcr.gpu import TritonGcr

    monkeypatch.setattr(gcr.dispatch.aten, "new_aten_state", lambda *args: "ATen")  # it asks for norms, which meta has not
    options: dict[str, Any] = {"eta": 0.1, "tol": 1e-3, "relative": True, "floor": 0.0}
    with rehearsal():
        for D, ours in (((2**31 - 1) // 41 // 16 * 16, True), (2**31 // 41 + 16, False)):
            z0 = torch.empty(1, D, device="meta")
            assert isinstance(broyden.new_state(z0, 40), TritonState) == ours
            if not ours:
                with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements"):
                    TritonState.for_capture(z0, 40, torch.float32, **options, limit=40)
        for D, ours in (((2**31 - 1) // 80 // 16 * 16, True), (2**31 // 80 + 16, False)):
            q = torch.empty(1, D, device="meta")
            if ours:
                TritonGcr.create(q, None, 40, 1e-3, 0.0, None, begin=False)
            else:
                assert gcr.new_state(q, None, 40, tol=1e-3) == "ATen"  # type: ignore[comparison-overlap]
                with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements"):
                    TritonGcr.create(q, None, 40, 1e-3, 0.0, None, begin=False)


def test_a_held_launch_takes_what_its_kernel_takes() -> None:
    """In the kernel's order; and a launcher that does not is not asked again."""
    from bench.kernels import kernels
    from deq_compile.kernels.broyden.gpu import Held

    seen: list[Any] = []

    class Compiled:
        broken = False

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any) -> None:
                if Compiled.broken:
                    raise TypeError("function takes another number of arguments")
                seen.append(("compiled", grid, args))

            return launch

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: seen.append(("kernel", grid, args, constants)) or Compiled()  # type: ignore[func-returns-value]

    held = Held()
    for _ in range(2):
        held.launch(Kernel(), (2, 1, 1), 1, 2, BD=3, TABLE=True, num_warps=4)
    assert seen == [
        ("kernel", (2, 1, 1), (1, 2), {"BD": 3, "TABLE": True, "num_warps": 4}),
        ("compiled", (2, 1, 1), (1, 2, 3, True)),
    ]
    Compiled.broken = True
    for _ in range(2):
        held.launch(Kernel(), (2, 1, 1), 1, 2, BD=3, TABLE=True, num_warps=4)
    assert [line[0] for line in seen] == ["kernel", "compiled", "kernel", "kernel"]
    assert kernels()["start"].arg_names[-4:] == ["D", "SLAB", "BD", "TABLE"]
    assert kernels()["addresses"].arg_names == ["table_ptr", "S_address", "C_address", "n_address"]
