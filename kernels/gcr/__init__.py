"""Preconditioned generalised conjugate residuals for the adjoint equation w = q + J^T w.

The one place where an implementation is chosen: callers use the names below and never an implementation's module.
"""

from .dispatch import move, new_state
from .state import GcrState

__all__ = ["GcrState", "move", "new_state"]
