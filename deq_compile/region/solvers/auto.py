"""Broyden, Anderson acceleration or plain iteration, whichever is less work (:mod:`deq_compile.region.choice` chooses)."""

from __future__ import annotations

from .base import SOLVERS
from .broyden import Broyden


class Auto(Broyden):
    """Broyden wherever nothing has been chosen: on a GPU, in programs that are exported, inside of somebody else's capture."""

    name = "auto"


AUTO = SOLVERS.register(Auto())
