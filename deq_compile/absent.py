"""Looking up names that a torch may not have."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

MISSING: dict[str, str] = {}  # name -> why it is not there


class Unavailable(AttributeError):
    """This torch does not have a part that was asked for."""


class Absent:
    """Stands for a missing name. No use of it succeeds: an `isinstance` that came out false could be a wrong answer."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Unavailable(MISSING.get(self.__dict__["_name"], f"torch {torch.__version__} has no {self.__dict__['_name']}"))

    __call__ = __getattr__ = __setattr__ = __instancecheck__ = _refuse


NOTHING = object()


Test = Callable[[Any], object]


def find(module: str, name: str, otherwise: Any = NOTHING, test: Test | None = None, key: str = "") -> Any:
    """A name of a module, with dots where it is one of a class. Where there is none, or `test` of it raises, `otherwise`, by
    default an `Absent`; why is then noted under `key`, by default the name.
    """
    key = key or name
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a changed module may raise while it is imported
        more = "" if isinstance(error, AttributeError | ModuleNotFoundError) else f" ({type(error).__name__}: {error})"
        MISSING[key] = f"torch {torch.__version__} has no {module}.{name}{more}"
    else:
        try:
            if test is not None:
                test(found)
            return found
        except Exception as error:
            MISSING[key] = f"{module}.{name} of torch {torch.__version__} is not what it was ({type(error).__name__}: {error})"
    return Absent(key) if otherwise is NOTHING else otherwise
