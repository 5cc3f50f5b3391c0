"""Shapes and dtypes of the kernels' entry points, checked at every call that a test of kernels makes.

The package itself does not need jaxtyping: a copy of each function with these annotations stands in for it while tests run.
Where a name of a dimension occurs twice in a call it means one size. `new_state` is not here: it checks what it is given itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from types import ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import Float, Float32, Float64, Int, jaxtyped
from torch import Tensor

from deq_compile.kernels import broyden, gcr, reuse
from deq_compile.kernels.broyden import dispatch as broyden_dispatch
from deq_compile.kernels.gcr import dispatch as gcr_dispatch
from deq_compile.kernels.reuse import dispatch as reuse_dispatch
from deq_compile.kernels.reuse import reference as reuse_reference

Compute = Float32[Tensor, "B D"] | Float64[Tensor, "B D"]
Any2D = Float[Tensor, "B D"]
PerSample = Float32[Tensor, "B"] | Float64[Tensor, "B"]

SHAPES: dict[tuple[ModuleType, str], dict[str, Any]] = {
    (broyden_dispatch, "step"): {"z": Compute, "f": Any2D, "stop_norm": PerSample | None, "last": bool, "return": None},
    (broyden_dispatch, "step_residual"): {"z": Compute, "g": Compute, "stop_norm": PerSample, "last": bool, "return": None},
    (broyden_dispatch, "advance"): {"z": Compute, "g": Compute, "return": None},
    (gcr_dispatch, "move"): {"jw": Any2D, "last": bool, "look": bool, "return": None},
    (reuse_dispatch, "apply_transpose"): {"x": Compute, "return": Compute},
    (reuse_dispatch, "multisecant"): {"skip": int, "return": reuse.Multisecant},
    (reuse_dispatch, "apply_multisecant"): {"x": Compute, "return": Compute},
    (reuse_reference, "dense_inverse"): {"S": Float[Tensor, "n D"], "return": Float64[Tensor, "D D"]},
    (reuse_reference, "apply_transpose_reference"): {
        "S": Float[Tensor, "B slots D"],
        "C": Float[Tensor, "B M W"],
        "n": Int[Tensor, "B"],
        "x": Float[Tensor, "B D"],
        "return": Float64[Tensor, "B D"],
    },
    (reuse_reference, "multisecant_reference"): {
        "z": Float[Tensor, "n D"],
        "g": Float[Tensor, "n D"],
        "return": Float64[Tensor, "D D"],
    },
}


def checked(function: Callable[..., Any], shapes: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function whose calls raise TypeError where an argument or the result is not of its shape and dtype."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__
    unknown = set(shapes) - {"return", *code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    assert not unknown, f"{function.__name__} has no {sorted(unknown)}"
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__, copy.__module__ = function.__kwdefaults__, dict(shapes), function.__module__
    found: Callable[..., Any] = jaxtyped(copy, typechecker=beartype)
    return found


def install() -> None:
    """Put checked copies where tests import these functions from."""
    for (module, name), shapes in SHAPES.items():
        original = getattr(module, name)
        if hasattr(original, "__checked__"):
            continue
        copy = checked(original, shapes)
        copy.__checked__ = True  # type: ignore[attr-defined]
        for place in (module, broyden, gcr, reuse):
            if getattr(place, name, None) is original:
                setattr(place, name, copy)
