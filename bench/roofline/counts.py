"""What one call of each kernel moves and computes, in fp32: the one place that knows. Change it along with the kernels.

A word counts each time a pass over its row loads or stores it. (That dot products load their right-hand side again for every
four or eight rows does not count: it is in the nearest cache by then.) Its *first* use in a call comes from wherever the call's
whole working set lies; used *again* it comes from wherever what was touched in between lies, mostly the rows of one sample.
Lines that a store fetches before it writes them are not counted: the bandwidth of copying, which is measured, pays for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deq_compile.testing import coefficient_width

WORD = 4
CHUNK = 8192  # as in vector.h: elements of a row that the Gram matrix is made of at a time


@dataclass(frozen=True)
class Stream:
    """Bytes by what is done with them, and the size of the set that they come from.

    read       loaded only
    new        stored without having been loaded
    updated    loaded and stored at once, counted twice
    """

    read: float
    new: float
    updated: float
    set_bytes: float

    @property
    def moved(self) -> float:
        return self.read + self.new + self.updated


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


Words = tuple[int, int, int]  # an element: read, new, updated


def _count(
    B: int, D: int, first: Words, again: Words, rows: tuple[int, int], flops: int, small: tuple[float, float] = (0, 0),
    small_flops: float = 0,
) -> Count:  # fmt: skip
    """From words and flops an element; `rows`: rows that are touched by a call, and between two uses of a word; `small`: words of
    n x n matrices that a sample reads and makes; `small_flops`: its flops on them."""
    element, sample, used = WORD * B * D, WORD * B, sum(small)
    return Count(
        Stream(
            first[0] * element + small[0] * sample, first[1] * element + small[1] * sample, first[2] * element,
            rows[0] * element + used * sample,
        ),
        Stream(again[0] * element, again[1] * element, again[2] * element, rows[1] * WORD * D + WORD * used),
        float(flops * B * D + small_flops * B),
    )  # fmt: skip


def step(B: int, D: int, n: int) -> Count:
    """The Broyden step with n stored steps: 2n + 8 words an element, 6n + 5 flops.

        residual   reads f, z, makes g                              3
        dots       reads n steps, once for both sets, and g         n + 1
        update     reads n - 1 steps, updates g, z, makes z_best    n + 4    (n + 3 where z is not the best iterate)

    First: f, z, n steps, g and z_best. Again, between the passes over a sample: all others.
    C: n (n - 1) / 2 words read and a row made, 2 n^2 flops a sample.
    """
    if n == 0:  # no dots and no products: the step is g
        return _count(B, D, (2, 2, 0), (0, 0, 4), (4, 4), 7)
    C = (n * (n - 1) / 2, coefficient_width(n))
    return _count(B, D, (n + 2, 2, 0), (n, 0, 4), (n + 4, n + 4), 6 * n + 5, C, 2 * n * n)


def move(B: int, D: int, k: int) -> Count:
    """The adjoint's move without operator, k pairs in the basis: 5k + 29 words an element, 10k + 29 flops.

        norms          reads q, jw, w; all samples, before anything else          3
        new pair       reads q, jw, w, r, x, makes y, z                           7
        dots           reads k images and y; twice                                2 (k + 1)
        orthogonalise  reads k images and r, updates y; twice                     2 (k + 3)
        take           reads k directions, updates z, y, x, r, w, makes z_best    k + 11

    First: those of the norms, then q, jw, images, directions, x, r, w (updated), y, z and z_best. Again, within a sample: images
    three times more, and what is left of y, z, x, r and w. In the first move x = 0 and r = q: 18 words, 19 flops.
    """
    if k == 0:
        return _count(B, D, (5, 5, 2), (2, 0, 4), (8, 8), 19)
    return _count(B, D, (2 * k + 5, 3, 6), (3 * k + 7, 0, 8), (2 * k + 8, k + 2), 10 * k + 29)


def make(B: int, D: int, n: int) -> Count:
    """The factors M from n steps: n (n + 1) / 2 words and n (n + 1) flops an element, and 9 n^3 flops of algebra a sample.

        Gram matrix    row i with rows 0..i, chunk by chunk              n (n + 1) / 2
        algebra        R, Q: n^3 each, K: 2 n^3, its factor and two substitutions: n^3 each, V: 2 n^3, as rows of full width

    First: n rows, C's diagonal, V. Again: the rest, from a chunk of n rows. The algebra's own loads, about one a multiplication,
    are not counted: its matrices are n x n.
    """
    V = n * coefficient_width(n + 1)
    found = _count(B, D, (n, 0, 0), (n * (n + 1) // 2 - n, 0, 0), (n, 0), n * (n + 1), (n - 1, V), 9 * n**3)
    return replace(found, again=replace(found.again, set_bytes=WORD * n * min(D, CHUNK)))


def apply(B: int, D: int, n: int) -> Count:
    """M x with n steps: 2n + 5 words an element, 4n + 1 flops.

        copy     reads x, makes y            2
        dots     reads n steps and x         n + 1
        update   reads n steps, updates y    n + 2

    First: x, y and n steps. V: n^2 words and 2 n^2 flops a sample.
    """
    return _count(B, D, (n + 1, 1, 0), (n + 1, 0, 2), (n + 2, n + 2), 4 * n + 1, (n * n, 0), 2 * n * n)
