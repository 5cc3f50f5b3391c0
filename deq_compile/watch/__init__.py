"""Watch a training: what every solve did, step by step, in a file, a board or a picture.

Nothing here is loaded by ``import deq_compile``, and no optional library before somebody asks for what needs it::

    from deq_compile.watch import SolveLogger, plot_solves

    with SolveLogger("solves.csv", every=10) as log:
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            log.step()
    plot_solves("solves.csv", "solves.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .logger import SolveLogger
from .plot import plot_solves
from .rows import COLUMNS, rows_of
from .sinks import CSVSink, TensorBoardSink, WandbSink

if TYPE_CHECKING:
    from .lightning import LightningWatch
    from .trainer import TrainerWatch

__all__ = [
    "COLUMNS",
    "CSVSink",
    "LightningWatch",
    "SolveLogger",
    "TensorBoardSink",
    "TrainerWatch",
    "WandbSink",
    "plot_solves",
    "rows_of",
]

_LATE = {"LightningWatch": ".lightning", "TrainerWatch": ".trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LATE[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
