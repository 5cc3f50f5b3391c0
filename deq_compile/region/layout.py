"""The flat state: one (B, D) matrix a solver works on, and the tensors a body works on, as views into it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS_LAST = (0, 2, 3, 1)


def flat_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The solver's precision: fp64 if any state has it, else fp32 (bf16 and fp16 states are iterated on in fp32)."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def channels_last(operands: Sequence[Tensor]) -> list[Tensor]:
    """Operands of a body that works on images in this order, so that it need not bring them there in every call."""
    return [o.contiguous(memory_format=torch.channels_last) if o.dim() == 4 else o for o in operands]


@functools.lru_cache(maxsize=256)
def layout_of(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...], orders: tuple[tuple[int, ...], ...], rows: bool,
    channels_last: bool,
) -> Layout:  # fmt: skip
    """A `Layout`, the same object for the same facts."""
    return Layout(shapes, dtypes, orders, rows, channels_last)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How state tensors lie in the flat state.

    shapes  of the state tensors
    dtypes  of the state tensors
    orders  dimensions of each from slowest to fastest in memory (channels_last: 0, 2, 3, 1)
    rows    True: dimension 0 is a batch of independent samples, flat state (B, D).
            False: all is one coupled system, flat state (1, D).
    channels_last  whether images (four dimensions) lie in the flat state with their channels fastest, whatever `orders` says
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...], ...]
    rows: bool
    channels_last: bool = False

    def __hash__(self) -> int:  # layouts are looked up in every call
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.shapes, self.dtypes, self.orders, self.rows, self.channels_last))

    @functools.cached_property
    def batch(self) -> int:
        return self.shapes[0][0] if self.rows else 1

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        return tuple(math.prod(s[1:] if self.rows else s) for s in self.shapes)

    @functools.cached_property
    def width(self) -> int:
        return sum(self.widths)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return flat_dtype(self.dtypes)

    @functools.cached_property
    def _inner_orders(self) -> list[tuple[int, ...]]:
        """Orders with which a flat row is read: a batch dimension has to be the slowest one."""
        if self.channels_last:
            return [CHANNELS_LAST if len(o) == 4 else tuple(range(len(o))) for o in self.orders]
        return [o if not self.rows or o[:1] == (0,) else tuple(range(len(o))) for o in self.orders]

    @functools.cached_property
    def _contiguous(self) -> bool:
        """One state in the solver's dtype whose dimensions lie in order: it and its matrix are views of each other."""
        in_order = tuple(range(len(self.shapes[0])))
        return self.dtypes == (self.dtype,) and self.orders[0] == in_order == self._inner_orders[0]

    @functools.cached_property
    def _strides(self) -> tuple[int, ...]:
        return torch.empty_permuted(self.shapes[0], self.orders[0], device="meta").stride()

    def held(self, states: Sequence[Tensor]) -> Tensor:
        """The (B, D) matrix of what a forward handed to its backward: the flat state in one dimension, or the state tensors."""
        if len(states) == 1 and states[0].dim() == 1 and states[0].dtype == self.dtype:
            return states[0].view(self.batch, self.width)
        return self.matrix(states)

    def matrix(self, states: Sequence[Tensor]) -> Tensor:
        """As `flatten`; where the one state is a contiguous matrix already, that very tensor."""
        if self._contiguous and (state := states[0]).dtype == self.dtype and state.is_contiguous():
            return state if state.shape == (self.batch, self.width) else state.view(self.batch, self.width)
        return self.flatten(states)

    def flatten(self, states: Sequence[Tensor]) -> Tensor:
        """The states as one (B, D) matrix in the solver's dtype; may be a view where there is one state."""
        columns = [
            state.permute(order).reshape(self.batch, width).to(self.dtype)
            for state, order, width in zip(states, self._inner_orders, self.widths, strict=True)
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """State tensors in their own dtypes and memory orders, as views into `flat` where that is possible."""
        states = []
        for part, shape, dtype, order in zip(
            flat.split(self.widths, 1), self.shapes, self.dtypes, self._inner_orders, strict=True
        ):
            inverse = sorted(range(len(order)), key=order.__getitem__)
            states.append(part.reshape([shape[d] for d in order]).permute(inverse).to(dtype))
        return states

    def outputs(self, flat: Tensor, fresh: bool = False) -> list[Tensor]:
        """As `unflatten`, with exactly the strides of `empty_permuted(shape, order)` and sharing nothing with each other; with
        `fresh` nor with `flat`, and none of them a view."""
        if self._contiguous and flat.shape == self.shapes[0] and flat.stride() == self._strides:
            return [flat.clone() if fresh else flat]
        if self._contiguous and flat.is_contiguous() and (view := flat.view(self.shapes[0])).stride() == self._strides:
            return [view.clone() if fresh else view]
        found: list[Tensor] = []
        for state, order in zip(self.unflatten(flat), self.orders, strict=True):
            made = torch.empty_permuted(state.shape, order, dtype=state.dtype, device=state.device)
            single = len(self.shapes) == 1 and state.stride() == made.stride() and not fresh
            found.append(state if single else made.copy_(state))
        return found
