"""Reuse of Broyden's factors: products with the transposed inverse-Jacobian estimate, of type I and of type II.

The one place where an implementation is chosen: callers use the names below and never an implementation's module.
"""

from .dispatch import apply_multisecant, apply_transpose, multisecant
from .multisecant import Multisecant

__all__ = ["Multisecant", "apply_multisecant", "apply_transpose", "multisecant"]
