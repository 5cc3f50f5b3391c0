"""Parts of torch that are no public interface, each with what is lost where a torch does not have it.

A name that is missing is an `Absent`, and `MISSING` says why. Whoever touches it gets an `Unavailable`: a feature stays off, or
leaves what it looked at as it is; the import of this package and the user's compile go on.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter, defaultdict
from typing import Any

import torch

MISSING: dict[str, str] = {}  # name -> why this torch does not have it


class Unavailable(AttributeError):
    """This torch does not have a part that was asked for."""


class Absent:
    """Stands for a missing name. No use of it succeeds: an `isinstance` that came out false could be a wrong answer."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_: Any, **__: Any) -> Any:
        name = self.__dict__["_name"]
        raise Unavailable(f"torch {torch.__version__} has no {name}: {MISSING.get(name, '')}")

    __call__ = __getattr__ = __setattr__ = __instancecheck__ = _refuse


_NOTHING = object()


def find(module: str, name: str, otherwise: Any = _NOTHING) -> Any:
    """A name of a module; where there is none, `otherwise`, by default an `Absent`."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        MISSING[name] = f"{type(error).__name__}: {error}"
        return Absent(name) if otherwise is _NOTHING else otherwise


# Without it a decorated function inside an outer torch.compile has the outer options.
annotate = find("torch.fx.traceback", "annotate", lambda mark: contextlib.nullcontext())
# Without it TORCH_TRACE does not show the rewritten graph.
trace_structured = find("torch._logging._internal", "trace_structured", lambda *_, **__: None)
# Without them `explain` knows nothing of graph breaks.
counters: Any = find("torch._dynamo.utils", "counters", defaultdict(Counter))

# Without one of these no graph is rewritten (`NEEDED`).
enter_autocast = find("torch.amp.autocast_mode", "_enter_autocast")
exit_autocast = find("torch.amp.autocast_mode", "_exit_autocast")
FakeTensorMode = find("torch._subclasses.fake_tensor", "FakeTensorMode")
FakeTensor = find("torch._subclasses.fake_tensor", "FakeTensor")
is_functorch_wrapped = find("torch._C._functorch", "is_functorch_wrapped_tensor")
is_wrapper_subclass = find("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")
TorchDispatchMode = find("torch.utils._python_dispatch", "TorchDispatchMode", object)
free_unbacked_symbols = find("torch.fx.experimental.symbolic_shapes", "free_unbacked_symbols")
NEEDED = (
    "_enter_autocast", "_exit_autocast", "FakeTensorMode", "FakeTensor", "is_functorch_wrapped_tensor",
    "is_traceable_wrapper_subclass", "TorchDispatchMode", "free_unbacked_symbols",
)  # fmt: skip
