"""What a linearised body saved of operands that a graph reads in place: given back, and taken from the operands of each call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .operands import Operands


class Borrowed:
    """A linearised body without those of its saved tensors that are views of operands read in place.

    Kept, they would keep the operand alive: a large injection could then never lie at its old address again, which is the only
    place where the graph reads it. An operand of a call that is served lies there, so the same view of it is the same tensor.
    """

    def __init__(self, linear: Any, operands: Operands) -> None:
        """linear: has `saved`, a sequence of tensors and numbers. operands: not released yet."""
        saved = list(getattr(linear, "saved", ()))
        owners = {operands.tensors[i].untyped_storage().data_ptr(): i for i in operands.fixed if operands.tensors[i].numel()}
        # Where in `saved`, of which operand, bytes behind its start, and the view itself.
        self.views: list[tuple[int, int, int, torch.Size, tuple[int, ...], torch.dtype]] = []
        for at, tensor in enumerate(saved):
            owner = owners.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) and tensor.numel() else None
            if owner is not None:
                behind = tensor.data_ptr() - operands.tensors[owner].data_ptr()
                self.views.append((at, owner, behind, tensor.shape, tensor.stride(), tensor.dtype))
                saved[at] = None
        self.linear, self.saved = linear, saved

    def without(self) -> Any:
        """The linearised body between two calls, which keeps none of the operands."""
        return self._with(list(self.saved))

    def of(self, operands: Sequence[Tensor]) -> Any:
        """The linearised body of a call with these operands, which lie where they did at the capture."""
        saved = list(self.saved)
        for at, owner, behind, shape, stride, dtype in self.views:
            operand = operands[owner].detach()
            storage = operand.untyped_storage()
            start = (operand.data_ptr() + behind - storage.data_ptr()) // dtype.itemsize
            saved[at] = torch.empty(0, dtype=dtype, device=operand.device).set_(storage, start, shape, stride)
        return self._with(saved)

    def _with(self, saved: list[Any]) -> Any:
        linear = copy.copy(self.linear)
        linear.saved = saved
        return linear
