"""What the parts share: the setting, and rows that are written as they come."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from time import time
from typing import Any

import torch

from deq_compile.testing import captures

from .clocks import Clocks
from .store import Row, Store

BROKEN = ("illegal", "unspecified launch failure", "misaligned address", "device-side assert")


@dataclass
class Setting(Clocks):
    """Where a group of a part runs, until when it may, and where its rows go.

    dry    no device: tiny shapes in Triton's interpreter; times mean nothing
    until  seconds since the epoch; the process is stopped a little later
    run    number of the run in the store
    """

    part: str
    group: str
    store: Store
    dry: bool
    until: float
    run: int = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        return self.until - time()

    def row(self, what: str, **values: Any) -> None:
        """Append a row at once: what is there survives whatever comes next."""
        row: Row = {"run": self.run, "part": self.part, "group": self.group, "what": what, **values}
        self.store.add(row)
        print(json.dumps(row, default=str)[:300], flush=True)

    def enough(self, seconds: float, at: str) -> bool:
        """Whether that many seconds are left; a row says where the group stopped if not."""
        if self.left >= seconds:
            return True
        self.row("stopped: out of time", at=at)
        return False

    @contextlib.contextmanager
    def guarded(self, what: str, **values: Any) -> Iterator[None]:
        """A failure becomes a row, and the next measurement is taken. A broken device context ends the group."""
        try:
            yield
        except Exception as error:
            self.row(what, **values, error=f"{type(error).__name__}: {error}"[:600], trace=traceback.format_exc()[-1500:])
            if any(sign in str(error) for sign in BROKEN):
                raise

    def forget(self) -> None:
        """Drop all compiled code and captured solves, once the device has done what it was given."""
        self.sync()
        torch._dynamo.reset()
        captures.clear()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in float64; NaN where anything is NaN."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))
