"""What `deq::solve` returns, in one flat list: the one place that knows the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Places after the state.
TICKET, INFO = 0, 1
EXTRAS = 2


class Outputs(NamedTuple):
    """states  fresh tensors of the shapes of the initial state
    ticket     (4,) int64 on the CPU: see op.py
    info       (B, COLUMNS) float32 about the solve (solve_info.py)
    held       one tensor where the region records gradients, none otherwise
    """

    states: Sequence[Tensor]
    ticket: Tensor
    info: Tensor
    held: Sequence[Tensor]

    @classmethod
    def of(cls, flat: Sequence[Tensor], count: int) -> Outputs:
        """From the flat list of an operator whose state is `count` tensors."""
        return cls(flat[:count], flat[count + TICKET], flat[count + INFO], flat[count + EXTRAS :])

    @property
    def flat(self) -> list[Tensor]:
        return [*self.states, self.ticket, self.info, *self.held]
