"""What one call of each kernel moves and computes, in fp32: the one place that knows. Change it along with the kernels.

A word counts each time a pass over its row loads or stores it. (That dot products load their right-hand side again for every
four or eight rows does not count: it is in the nearest cache by then.) Its *first* use in a call comes from wherever the call's
whole working set lies; used *again* it comes from wherever what was touched in between lies, mostly the rows of one sample.
Lines that a store fetches before it writes them are not counted: the bandwidth of copying, which is measured, pays for them too.
"""

from __future__ import annotations

from dataclasses import dataclass

from deq_compile.kernels.broyden import coefficient_width

WORD = 4
CHUNK = 8192  # as in vector.h: elements of a row that the Gram matrix is made of at a time


@dataclass(frozen=True)
class Stream:
    """Bytes that are read and written, and the size of the set that they come from."""

    read: float
    written: float
    set_bytes: float

    @property
    def moved(self) -> float:
        return self.read + self.written


@dataclass(frozen=True)
class Count:
    first: Stream
    again: Stream
    flops: float

    @property
    def moved(self) -> float:
        return self.first.moved + self.again.moved

    @property
    def working_set(self) -> float:
        return self.first.set_bytes


def _count(
    B: int, D: int, first: tuple[int, int], again: tuple[int, int], rows: tuple[int, int], flops: int,
    small: tuple[float, float] = (0, 0), small_flops: float = 0,
) -> Count:  # fmt: skip
    """From words an element, read and written; `rows`: rows that are touched by a call, and between two uses of a word;
    `small`: words a sample of n x n matrices; both kinds of flops likewise."""
    element, sample = WORD * B * D, WORD * B
    per_row, used = WORD * D, sum(small)
    return Count(
        Stream(first[0] * element + small[0] * sample, first[1] * element + small[1] * sample, rows[0] * element + used * sample),
        Stream(again[0] * element, again[1] * element, rows[1] * per_row + WORD * used),
        float(flops * B * D + small_flops * B),
    )


def step(B: int, D: int, n: int) -> Count:
    """The Broyden step with n stored steps: 2n + 8 words an element, 6n + 5 flops.

        residual   reads f, z, writes g                                     3
        dots       read n steps and g, once for both sets                   n + 1
        update     reads n - 1 steps, g, z, writes g, z and z_best          n + 4     (without the best iterate n + 3)

    First: f, z, n steps, g and z_best. Again, between two passes over a sample: n - 1 steps, g three times, z twice.
    C: n (n - 1) / 2 words read and a row written, 2 n^2 flops a sample.
    """
    if n == 0:  # no dots and no products: the step is g
        return _count(B, D, (2, 2), (2, 2), (4, 4), 7)
    C = (n * (n - 1) / 2, coefficient_width(n))
    return _count(B, D, (n + 2, 2), (n + 2, 2), (n + 4, n + 4), 6 * n + 5, C, 2 * n * n)


def move(B: int, D: int, k: int) -> Count:
    """The adjoint's move without operator, k pairs in the basis: 5k + 27 words an element, 10k + 25 flops.

        judge          reads q, jw, w, r, x, writes rt, y, z; all samples, before anything else      8
        dots           read k images and y; twice                                                    2 (k + 1)
        orthogonalise  reads k images, y, r, writes y; twice                                         2 (k + 3)
        take           reads k directions, z, y, x, r, w, writes z, y, x, r, w and z_best            k + 11

    (The source says "about 5k + 24".) From the whole set: judge's 8, k images, k directions, then y, r, z, x, w once more, since
    all samples were judged in between, and z_best. Again, within a sample: 3k images and 13 words.
    """
    if k == 0:
        return _count(B, D, (10, 9), (0, 0), (9, 9), 17)
    # writes: rt, y, z by judge; y twice again, then z, y, x, r, w, z_best by take
    return _count(B, D, (2 * k + 10, 4), (3 * k + 6, 7), (2 * k + 9, k + 2), 10 * k + 25)


def make(B: int, D: int, n: int) -> Count:
    """The factors M from n steps: n (n + 1) / 2 words and n (n + 1) flops an element, and 9 n^3 flops of algebra a sample.

        Gram matrix    row i with rows 0..i, chunk by chunk              n (n + 1) / 2
        algebra        R, Q: n^3 each, K: 2 n^3, its factor and two substitutions: n^3 each, V: 2 n^3, as rows of full width

    First: n rows, V. Again: the rest, from a chunk of n rows. The algebra's own loads, about one a multiplication, are not
    counted: its matrices are n x n.
    """
    reads = n * (n + 1) // 2
    found = _count(B, D, (n, 0), (reads - n, 0), (n, 0), n * (n + 1), (n, n * coefficient_width(n + 1)), 9 * n**3)
    return Count(found.first, Stream(found.again.read, 0, WORD * n * min(D, CHUNK)), found.flops)


def apply(B: int, D: int, n: int) -> Count:
    """M x with n steps: 2n + 5 words an element, 4n + 1 flops.

        copy     reads x, writes y             2
        dots     read n steps and x            n + 1
        update   reads n steps, y, writes y    n + 2

    First: x, y and n steps. V: n^2 words and 2 n^2 flops a sample.
    """
    return _count(B, D, (n + 1, 1), (n + 2, 1), (n + 2, n + 2), 4 * n + 1, (n * n, 0), 2 * n * n)
