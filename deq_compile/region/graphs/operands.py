"""The operands of a captured solve: small ones are copied to buffers of its own, large ones are read where they lie.

A graph reads fixed addresses. A parameter stays where it is from step to step, an injection does not; and what is read in place
is right as long as it still lies there, whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deq_compile.torch_parts import foreach_copy_

# Copying less than this costs about as much as one launch.
SMALL_BYTES = 1 << 20
# An operand that moved this often is copied from then on (FSDP2 frees and remaps its parameters).
MISSES_BEFORE_COPY = 2


class Operands:
    """Which operands are copied, decided from two calls in a row.

    misses  calls whose operands did not lie where they were expected
    """

    def __init__(self, operands: Sequence[Tensor], earlier: Sequence[int], always: frozenset[int]) -> None:
        self.copied = [
            i
            for i, o in enumerate(operands)
            if i in always or o.numel() * o.element_size() <= SMALL_BYTES or o.data_ptr() != earlier[i]
        ]
        chosen = set(self.copied)
        self.fixed = [i for i in range(len(operands)) if i not in chosen]
        self.addresses = [operands[i].data_ptr() for i in self.fixed]
        self.tensors = [
            torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device=o.device) if i in chosen else o.detach()
            for i, o in enumerate(operands)
        ]
        self.targets = [_compact(self.tensors[i]) for i in self.copied]
        if self.targets:  # the warm-up reads them: an index that is not one would break the device's context
            foreach_copy_(self.targets, [_compact(operands[i]) for i in self.copied])
        self.misses = 0
        self.moved: set[int] = set()

    def release(self) -> None:
        """After the capture: what is read in place belongs to somebody else, and is not kept alive."""
        for i in self.fixed:
            self.tensors[i] = self.tensors[i].new_empty(0)

    def load(self, operands: Sequence[Tensor]) -> bool:
        """Bring in the operands of a call. False where one lies elsewhere than the graph expects; nothing is copied then."""
        moved = [i for i, at in zip(self.fixed, self.addresses, strict=True) if operands[i].data_ptr() != at]
        if moved:
            self.misses += 1
            self.moved.update(moved)
            return False
        if self.targets:
            foreach_copy_(self.targets, [_compact(operands[i]) for i in self.copied])
        return True

    @property
    def hopeless(self) -> bool:
        """Whether to capture anew, copying what has moved."""
        return self.misses >= MISSES_BEFORE_COPY


def _compact(tensor: Tensor) -> Tensor:
    """Without the repeats of expanded dimensions: each element of memory once."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.detach()


def addresses(operands: Sequence[Tensor]) -> list[int]:
    return [o.data_ptr() for o in operands]
