"""Reuse of Broyden's factors: products with the transposed inverse-Jacobian estimate, and the adjoint residual.

The one place where an implementation is chosen: callers use the names below and never an implementation's module.
"""

from .dispatch import adjoint_residual, apply_transpose

__all__ = ["adjoint_residual", "apply_transpose"]
