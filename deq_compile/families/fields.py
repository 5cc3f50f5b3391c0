"""What a solver returns beside the fixed point: the fields of its result, found out by trying.

The same problem is solved with caps of 3 and 5 iterations too, and ten thousand times smaller. A Python integer that grows with
the cap counts, a bool that turns is the flag of convergence, a number that falls is a residual, absolute where it is as small
as the problem. What is equal in all of these runs is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Fields of a dictionary, by the names that published solvers give them.
BY_NAME = {
    "lowest": "residual", "abs_lowest": "absolute", "rel_lowest": "relative", "residual": "residual", "res": "residual",
    "nstep": "iterations", "tnstep": "iterations", "steps": "iterations", "n_iter": "iterations", "iterations": "iterations",
    "abs_trace": "absolute list", "rel_trace": "relative list", "trace": "residual list",
    "eps": "tol", "tol": "tol", "threshold": "cap", "max_iter": "cap", "prot_break": "false", "diverged": "false",
}  # fmt: skip
MOST = 100  # the cap of the run that converges
CAPS = (3, 5)  # of the two runs that are stopped early
SMALLER = 1e-4  # the scale of the problem whose residuals tell absolute from relative
UNTOLD = "untold"  # a tensor that no solve of ours has: it may be returned, and must not be used


def field(name: str, value: Any, early: list[Any], small: Any) -> Any:
    """What one field is; a text that starts with "?" where it is not known.

    Args:
        name: its key or place.
        value: in the run that converged.
        early: in the runs with the caps of CAPS; empty where the solver has no cap.
        small: in a run of a problem that is SMALLER, stopped at CAPS[1]; None where there was none.
    """
    if value is None:
        return "none"
    if isinstance(value, str | bytes | torch.dtype | torch.device):
        return _constant(name, value, early)
    if type(value) is bool:
        return _flag(name, value, early)
    counted = _count(name, value, early) if type(value) is int else None
    if counted is not None or name in BY_NAME:
        return counted or _of_its_type(BY_NAME[name], value)
    found = _numbers(value)
    if found is not None and found[-1] <= 1e-4 and found[-1] <= found[0]:
        return _of_its_type(f"{_kind(_numbers(early[1]) if len(early) == 2 else None, _numbers(small))} list", value)
    number = _single(value)
    if number is not None and len(early) == 2:
        return _number(name, value, number, [_single(v) for v in early], _single(small))
    return UNTOLD if isinstance(value, Tensor) else f"? {type(value).__name__} at {name!r}"


def _of_its_type(what: str, value: Any) -> str:
    """What is a Python number, or a list of them, stays that: it may be written as JSON, or compared with `is`."""
    if what.endswith(" list"):
        return what.replace(" list", " floats") if isinstance(value, list) and not any(map(torch.is_tensor, value)) else what
    measured = what in ("residual", "absolute", "relative", "iterations")
    return f"{what} number" if measured and isinstance(value, int | float) and not isinstance(value, bool) else what


def _count(name: str, value: int, early: Sequence[Any]) -> Any:
    if len(early) < 2 or not all(type(v) is int for v in early):
        return None
    if (value, *early) == (MOST, *CAPS):
        return "cap"
    if early[1] - early[0] == CAPS[1] - CAPS[0]:
        return ("count", early[0] - CAPS[0])
    return ("constant", value) if name not in BY_NAME and value == early[0] == early[1] else None


def _constant(name: str, value: Any, early: Sequence[Any]) -> Any:
    return ("constant", value) if all(v == value for v in early) else f"? {type(value).__name__} at {name!r}"


def _flag(name: str, value: bool, early: Sequence[Any]) -> Any:
    if name in BY_NAME:
        return BY_NAME[name]
    if len(early) == 2 and all(type(v) is bool and v is not value for v in early):
        return "converged" if value else "missed"
    return ("constant", value) if early and all(v is value for v in early) else f"? bool at {name!r}"


def _number(name: str, value: Any, number: float, early: list[float | None], small: float | None) -> Any:
    """A residual is small where the run converged, and falls before."""
    known = [v for v in early if v is not None]
    if len(known) < 2:
        return f"? {type(value).__name__} at {name!r}"
    if number <= 1e-4 and number < known[1] < known[0]:
        kind = _kind([known[1]], None if small is None else [small])
        return kind if isinstance(value, Tensor) else f"{kind} number"
    if number == known[0] == known[1] and not isinstance(value, Tensor):
        return ("constant", value)
    return UNTOLD if isinstance(value, Tensor) else f"? {type(value).__name__} at {name!r}"


def _kind(usual: list[float] | None, small: list[float] | None) -> str:
    if not usual or not small or usual[-1] == 0:
        return "relative"
    return "absolute" if small[-1] < math.sqrt(SMALLER) * usual[-1] else "relative"


def _single(value: Any) -> float | None:
    if isinstance(value, float) or (type(value) is int):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        return float(value)
    return None


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(v, float | int | Tensor) and not isinstance(v, bool) for v in value):
        return None
    found = [float(v) for v in value if not isinstance(v, Tensor) or v.numel() == 1]
    return found if len(found) == len(value) else None
