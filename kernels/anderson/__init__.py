"""Anderson acceleration, type II, of a batched fixed-point iteration: C++ on a CPU, ATen elsewhere."""

from .dispatch import new_state, step

__all__ = ["new_state", "step"]
