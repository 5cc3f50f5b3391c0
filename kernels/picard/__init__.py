"""Plain iteration, z <- f(z), sample by sample: C++ on a CPU, ATen elsewhere."""

from .dispatch import new_state, step

__all__ = ["new_state", "step"]
