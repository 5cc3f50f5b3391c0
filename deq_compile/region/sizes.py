"""All sizes of a call of a body in one row, and what stays when they change."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import Layout


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a call: of the states, those given as numbers, and of the operands, in this order.

    dims           all of them
    sizes_begin    where those given as numbers begin
    tensors_begin  where those of the operands begin
    ranks          numbers of dimensions of the operands
    strides        of the operands
    """

    dims: tuple[int, ...]
    sizes_begin: int
    tensors_begin: int
    ranks: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(layout: Layout, operands: Sequence[Tensor], sizes: Sequence[int]) -> Sizes:
        states = [n for shape in layout.shapes for n in shape]
        dims = (*states, *sizes, *(n for o in operands for n in o.shape))
        begin = len(states)
        return Sizes(
            dims, begin, begin + len(sizes), tuple(o.dim() for o in operands), tuple(tuple(o.stride()) for o in operands)
        )

    @property
    def given(self) -> tuple[int, ...]:
        """The sizes that a call is given as numbers."""
        return self.dims[self.sizes_begin : self.tensors_begin]

    @functools.cached_property
    def spans(self) -> list[slice]:
        """Where each operand's sizes are."""
        ends = itertools.accumulate(self.ranks, initial=self.tensors_begin)
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    @functools.cached_property
    def dense_orders(self) -> list[tuple[int, ...] | None]:
        """The order of each operand's dimensions, slowest first, where it has no holes and no overlaps; else None."""
        return [_dense_order(self.dims[span], strides) for span, strides in zip(self.spans, self.strides, strict=True)]

    def symbolic_strides(self, dims: Sequence[Any], varies: Sequence[bool]) -> list[Sequence[Any]]:
        """Strides of the operands, with symbols `dims` for sizes. Those of a tensor with holes are numbers."""
        found: list[Sequence[Any]] = []
        for span, strides, order in zip(self.spans, self.strides, self.dense_orders, strict=True):
            if order is None or not any(varies[span]):
                found.append(strides)
                continue
            steps, step = list(strides), 1
            for d in reversed(order):
                steps[d] = step
                step = step * dims[span][d]
            found.append(steps)
        return found

    def strides_like(self, other: Sizes, varies: Sequence[bool]) -> bool:
        """Whether the operands lie as those of `other`, as `symbolic_strides` has them."""
        for i, span in enumerate(self.spans):
            if other.dense_orders[i] is None or not any(varies[span]):
                if self.strides[i] != other.strides[i]:
                    return False
            elif self.dense_orders[i] is None or self.strides[i] != _strides_of(self.dims[span], other.dense_orders[i]):
                return False
        return True


def _dense_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    order = tuple(sorted(range(len(shape)), key=lambda d: (-strides[d], d)))
    return order if _strides_of(shape, order) == tuple(strides) else None


def _strides_of(shape: Sequence[int], order: Sequence[int] | None) -> tuple[int, ...]:
    assert order is not None
    return torch.empty_permuted(tuple(shape), tuple(order), device="meta").stride()
