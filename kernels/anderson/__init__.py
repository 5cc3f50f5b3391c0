"""Anderson acceleration, type II, of a batched fixed-point iteration."""

from .aten import AndersonState, new_state, step

__all__ = ["AndersonState", "new_state", "step"]
