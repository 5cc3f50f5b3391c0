"""deq_compile: a torch.compile backend that turns the fixed-point loops of unmodified models into Broyden solves."""

from .api import deq_compile, explain
from .backend import register_backend as _register_backend
from .caches import reset
from .capture import install as _install_capture
from .capture.solver_family import SolveInfo, register_solver
from .config import Options
from .explicit import fixed_point
from .region.records import SolveRecord, record_solves
from .region.verdict import RegionWarning
from .regularise import jac_reg, spectral_radius
from .report import Location, Reason, Region, Report, Skipped

__version__ = "0.1.0"

__all__ = [
    "Location",
    "Options",
    "Reason",
    "Region",
    "RegionWarning",
    "Report",
    "Skipped",
    "SolveInfo",
    "SolveRecord",
    "deq_compile",
    "explain",
    "fixed_point",
    "jac_reg",
    "record_solves",
    "register_solver",
    "reset",
    "spectral_radius",
]

_register_backend()
_install_capture()
