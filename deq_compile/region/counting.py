"""What work costs, by counting: operations of matrix products, elements and calls. No clock is asked, so that equal runs decide
alike.

The unit is an operation of a large matrix product, 100 of which one core of an Intel Xeon carries out in a nanosecond.
(`torch.utils.flop_counter` counts the same, and brings Dynamo and Triton with it, a second of imports in eager mode.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from deq_compile.torch_parts import TorchDispatchMode

# An element of the state in an evaluation, beside its products: 1 ns. What one call of compiled code takes, 40 us; and an
# operator in eager mode, 4 us, where those come to more.
ELEMENT, CALL, OPERATOR = 100.0, 4e6, 4e5
# Taking an element through a shared inverse of rank r: 4 r operations of thin products, and what is read and written twice more.
THIN_COST, THIN_ELEMENT, THIN_CALLS = 1.5, 60.0, 1.2e6
# Launches of kernels: of a body's at least, of a step (those of a move are more), of the two thin products.
LEAST_LAUNCHES, STEP_LAUNCHES, THIN_LAUNCHES = 2, 2, 2


class Counter(TorchDispatchMode):
    """Counts what runs within it: `flops` of matrix products, convolutions and attention, and `operators`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.operators = 0, 0


def _count(self: Counter, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    out = func(*args, **(kwargs or {}))
    self.operators += 1
    if getattr(func, "namespace", "") == "aten":  # another's operator may have any arguments
        self.flops += _flops(str(func).split(".")[1], args, out)
    return out


# After the class is made: torch wraps a method that stands in it into one that imports Dynamo.
Counter.__torch_dispatch__ = _count
if TorchDispatchMode is object:  # a torch without it: work is calls and elements, then
    Counter.__enter__ = lambda self: self
    Counter.__exit__ = lambda self, *_: None


def _flops(name: str, args: Any, out: Any) -> int:
    """Operations of one operator of ATen."""
    if name in ("mm", "bmm"):
        return 2 * math.prod(args[0].shape) * args[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * math.prod(args[1].shape) * args[2].shape[-1]
    if name == "convolution":
        image, weight, transposed = args[0], args[1], args[6]
        return 2 * (image if transposed else out).numel() * weight[0].numel()
    if name == "convolution_backward":
        grad, image, weight, transposed = args[0], args[1], args[2], args[7]
        return 2 * (image if transposed else grad).numel() * weight[0].numel() * sum(args[-1][:2])
    if name.startswith("_scaled_dot_product"):
        query, key = args[1:3] if "backward" in name else args[:2]
        return (10 if "backward" in name else 4) * query.numel() * key.shape[-2]
    return 0


def _compiles_itself(function: Callable[[Tensor], Any], z: Tensor) -> bool:
    """Whether function(z) calls compiled code or an operator of higher order in eager mode: where that has run under a dispatch
    mode, torch fails at the next one without (`torch.cond`, torch 2.11 to 2.14). It is taken to while a profiler is at work that
    Python cannot set again (cProfile)."""
    if "torch._dynamo" not in sys.modules:
        return False
    before: Any = sys.getprofile()
    seen = []
    if before is not None and not callable(before):
        return True

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call" and any(part in frame.f_code.co_filename for part in ("_higher_order_ops", "_dynamo")):
            seen.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        function(z)
    finally:
        sys.setprofile(before)
    return bool(seen)


def counted(function: Callable[[Tensor], Any], z: Tensor) -> tuple[int, int]:
    """Operations of products, and operators, of function(z), which has run before; none where it compiles itself."""
    if _compiles_itself(function, z):
        return 0, 0
    with Counter() as counter:
        function(z)
    return counter.flops, counter.operators


def work(function: Callable[[Tensor], Any], z: Tensor, calls: int = 1) -> float:
    """Operations of function(z), for states like z (B, D), which takes so many calls of compiled code at least."""
    flops, operators = counted(function, z)
    return flops + ELEMENT * z.numel() + max(calls * CALL, operators * OPERATOR)


def thin(rank: int, z: Tensor) -> float:
    """Operations of taking states like z (B, D) through a shared inverse of that rank; 0 for rank 0."""
    return (4.0 * THIN_COST * rank + THIN_ELEMENT) * z.numel() + THIN_CALLS if rank else 0.0


def dearer(function: Callable[[Tensor], Any], z: Tensor) -> float:
    """On a GPU: how many times as much an evaluation of function(z) costs that a shared inverse takes part in, where launches
    are what counts: those of the function, as far as its operators say, of a step, and two of thin products."""
    launches = max(counted(function, z)[1], LEAST_LAUNCHES) + STEP_LAUNCHES
    return (launches + THIN_LAUNCHES) / launches
