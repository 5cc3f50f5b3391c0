"""What work costs, by counting: operations of matrix products, elements and calls. No clock is asked, so that equal runs decide
alike.

The unit is an operation of a large matrix product, 100 of which one core of an Intel Xeon carries out in a nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deq_compile.torch_parts import TorchDispatchMode

# An element of the state in an evaluation, beside its products: 1 ns. What one call of compiled code takes, 40 us; and an
# operator in eager mode, 4 us, where those come to more.
ELEMENT, CALL, OPERATOR = 100.0, 4e6, 4e5
# Taking an element through a shared inverse of rank r: 4 r operations of thin products, and what is read and written twice more.
THIN_COST, THIN_ELEMENT, THIN_CALLS = 1.5, 60.0, 1.2e6


def work(function: Callable[[Tensor], Any], z: Tensor, calls: int = 1) -> float:
    """Operations of function(z), for states like z (B, D), which takes so many calls of compiled code at least."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    with FlopCounterMode(display=False) as counter, Operators() as operators:
        function(z)
    return counter.get_total_flops() + ELEMENT * z.numel() + max(calls * CALL, operators.count * OPERATOR)


def thin(rank: int, z: Tensor) -> float:
    """Operations of taking states like z (B, D) through a shared inverse of that rank; 0 for rank 0."""
    return (4.0 * THIN_COST * rank + THIN_ELEMENT) * z.numel() + THIN_CALLS if rank else 0.0
