"""Run a user's code to see what it does, and leave no trace: no text, no warning, no draw from a random stream."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """What the code within prints, warns of or draws from the CPU's random streams (torch, Python, numpy) did not happen."""
    numpy = sys.modules.get("numpy")
    drawn, python = torch.get_rng_state(), random.getstate()
    numbers = numpy.random.get_state() if numpy is not None else None
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(drawn)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numbers)
