"""What all iterations share: where each sample stands, and when it stops. The one place that says so, in each language."""

from .aten import observe, observe_by_masks
from .state import (
    CONVERGED,
    FALL,
    FLOOR,
    MAX_ITER,
    NONFINITE,
    NORM_EPS,
    RESOLUTION,
    RUNNING,
    Progress,
    new_progress,
    progress_fields,
    solve_info_of,
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
    "Progress",
    "new_progress",
    "observe",
    "observe_by_masks",
    "progress_fields",
    "solve_info_of",
]
