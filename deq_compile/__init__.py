"""deq_compile: a torch.compile backend that turns the fixed-point loops of unmodified models into Broyden solves.

Importing it costs little and touches nothing of Dynamo's: what needs Dynamo is imported when somebody first asks for it, and
capture is switched on when a backend of ours is first looked up.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from . import ready  # noqa: F401, first: whether the rest can be imported
from .config import Options
from .explicit import fixed_point
from .region.records import SolveRecord, record_solves
from .region.verdict import RegionWarning
from .regularise import jac_reg, spectral_radius
from .report import Location, Reason, Region, Report, Skipped
from .solve_info import SolveInfo

if TYPE_CHECKING:
    from .api import deq_compile, explain
    from .caches import reset
    from .families.solvers import register_solver

__version__ = "0.2.0"

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

_LATE = {"deq_compile": ".api", "explain": ".api", "reset": ".caches", "register_solver": ".families.solvers"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LATE[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """A module that says what was meant where it is called."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "deq_compile: expected the decorator, got the module of the same name. Fix: `from deq_compile import deq_compile`, "
            "or `@deq_compile.deq_compile` after `import deq_compile`"
        )


sys.modules[__name__].__class__ = _Package


# An installed package is found by torch through its entry point; a plain checkout has to be made known, at the price of Dynamo.
if "deq" not in entry_points(group="torch_dynamo_backends").names:
    importlib.import_module(".backend", __name__)
