"""Limited-memory good Broyden with one stored vector an iteration.

The one place where an implementation is chosen: callers use the names below and never an implementation's module.
"""

from .aten import observe
from .dispatch import advance, new_state, step, step_residual
from .state import (
    CONVERGED,
    FALL,
    FLOOR,
    MAX_ITER,
    NONFINITE,
    NORM_EPS,
    RESOLUTION,
    RUNNING,
    BroydenState,
    Factors,
    Progress,
    about_of,
    coefficient_width,
    factors_of,
    new_progress,
    row_width,
)

__all__ = [
    "CONVERGED",
    "FALL",
    "FLOOR",
    "MAX_ITER",
    "NONFINITE",
    "NORM_EPS",
    "RESOLUTION",
    "RUNNING",
    "BroydenState",
    "Factors",
    "Progress",
    "about_of",
    "advance",
    "coefficient_width",
    "factors_of",
    "new_progress",
    "new_state",
    "observe",
    "row_width",
    "step",
    "step_residual",
]
