"""Reuse of Broyden's factors: products with the transposed inverse-Jacobian estimate.

The one place where an implementation is chosen: callers use the name below and never an implementation's module.
"""

from .aten import apply_transpose

__all__ = ["apply_transpose"]
