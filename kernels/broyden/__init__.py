"""Limited-memory good Broyden with one stored vector an iteration.

The one place where an implementation is chosen: callers use the names below and never an implementation's module.
"""

from .dispatch import advance, new_state, step, step_preconditioned, step_residual, step_shared
from .padded import Steps
from .padded import advance as advance_padded
from .state import BroydenState, Factors, coefficient_width, factors_of, row_width

__all__ = [
    "BroydenState",
    "Factors",
    "Steps",
    "advance",
    "advance_padded",
    "coefficient_width",
    "factors_of",
    "new_state",
    "row_width",
    "step",
    "step_preconditioned",
    "step_residual",
    "step_shared",
]
