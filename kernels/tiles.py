"""Tile sizes and splits of the Triton kernels, by shape alone: sums come out the same on every device, unless it was tuned."""

from __future__ import annotations

from dataclasses import dataclass

from . import tuned


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


def offsets_fit(rows: int, row: int) -> bool:
    """Whether the kernels can address `rows` rows of `row` elements of one sample: offsets within a sample are 32-bit numbers.
    Larger ones are left to ATen."""
    return rows * row < 2**31


def padded(B: int) -> int:
    """The row length of counters of B samples: see `triton_shared.padded`."""
    return (B + 31) // 32 * 32


@dataclass(frozen=True)
class Tiles:
    """How one launch cuts its work.

    BM      rows of steps in a tile: a power of two, at least the number of steps stored
    BD      columns of a tile of steps; BM * BD numbers are two accumulators of the dot products
    BD2     columns of a tile of the update
    slabs   programs a row is split over; 1: the fused form
    slab    columns of one of them
    stages  of the software pipeline of the dot products
    warps   of a program
    """

    BM: int
    BD: int
    BD2: int
    slabs: int
    slab: int
    stages: int
    warps: int


# Columns of a tile of steps by its rows: 4096 numbers an accumulator, 16 to 32 registers a thread.
_COLUMNS = {8: 512, 16: 256, 32: 128, 64: 64, 128: 32}
# A row this short is best worked on by one program; with enough rows to fill a GPU, a longer one is too.
FUSED_COLUMNS = 8192
FUSED_COLUMNS_MANY_ROWS = 32768
MANY_ROWS = 128
SLAB_COLUMNS = 4096
MOST_SLABS = 64


def tiles(B: int, D: int, steps: int, element_size: int = 4) -> Tiles:
    """The tiles for B samples of D elements with up to `steps` steps stored; `element_size` is that of the compute dtype. What
    was tuned for this machine (:mod:`.tuned`), or the table above."""
    return tuned.lookup(B, D, steps, element_size) or by_shape(B, D, steps, element_size)


def by_shape(B: int, D: int, steps: int, element_size: int = 4) -> Tiles:
    """The table's tiles. fp64 halves the columns."""
    BM = min(max(power_of_two(steps), 8), 128)
    BD = max(_COLUMNS[BM] * 4 // max(element_size, 4), 16)
    fused = D <= FUSED_COLUMNS or (B >= MANY_ROWS and D <= FUSED_COLUMNS_MANY_ROWS)
    if fused:
        # A row of up to 1024 is one tile of the update: its loads of steps are independent, while tiles wait for one another.
        return Tiles(BM, BD, min(max(power_of_two(D), 128), 1024), 1, D, 3, 8)
    slabs = min(-(-D // SLAB_COLUMNS), MOST_SLABS)
    slab = -(-D // slabs)
    slab = (slab + 15) // 16 * 16
    many = BM > 64
    return Tiles(BM, BD, 2048 if many else 512, -(-D // slab), slab, 3, 16 if many else 4)
