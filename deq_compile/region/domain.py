"""Bodies that are not defined everywhere: f(z) may raise (a Cholesky factor, an index, a check of arguments) where the user's own
loop never comes, and a solver, a probe or a second start does. Such a value counts as one that is not finite.

What raises once and not again at the same z has another cause, a timeout or a worker that died, and is raised.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("deq_compile.region")

_MEMORY = (MemoryError, torch.OutOfMemoryError)  # says nothing of z
LONGEST = 120


def evaluated(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, str]:
    """f(z) and "", or NaN like z (B, D) and what f has raised."""
    try:
        return f(z), ""
    except _MEMORY:
        raise
    except Exception as error:
        if not _again(f, z, error):
            raise
        log.info("the body raised at an iterate of ours: %r", error)
        return torch.full_like(z, math.nan), in_short(error)


def _again(f: Callable[[Tensor], Tensor], z: Tensor, error: Exception) -> bool:
    """Whether f raises an error of that kind at z once more."""
    try:
        f(z)
    except type(error):
        return True
    except Exception:
        return False
    return False


def in_short(error: Exception) -> str:
    """An error in a line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:LONGEST]}" if first else type(error).__name__


def or_nan(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same f, NaN where it raises."""
    return lambda z: evaluated(f, z)[0]
