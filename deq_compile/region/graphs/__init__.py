"""How the iterations of a solve reach a GPU.

    loop    a plain Python loop: body, step, a look at the device every few iterations (forward.py, adjoint.py)
    chunks  k iterations are one CUDA graph; the host reads a flag between two replays
    while   the whole solve is one CUDA graph with a WHILE node: the last kernel of an iteration decides about the next one, or
            writes a flag that a node of the loop's own looks at (engines.py, STRUCTURE)

A solve of new shapes runs in the loop first, which warms everything up; the second one captures. What cannot be captured steps
down: while, chunks, loop. The reason is kept and shown. A capture that fails leaves torch as it was (device.py).
"""

from .adjoint import AdjointSettings, CapturedAdjoint, captured_adjoint
from .captured import Captured, Declined
from .captures import capturing, clear, current_device, end_with, held, made_current, under_capture, used
from .device import Refused
from .forward import CapturedForward, ForwardSettings, captured_forward

__all__ = [
    "AdjointSettings",
    "Captured",
    "CapturedAdjoint",
    "CapturedForward",
    "Declined",
    "ForwardSettings",
    "Refused",
    "captured_adjoint",
    "captured_forward",
    "capturing",
    "clear",
    "current_device",
    "end_with",
    "held",
    "made_current",
    "under_capture",
    "used",
]
