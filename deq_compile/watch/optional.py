"""Libraries that only some ways of watching need."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, who: str, package: str) -> Any:
    """Import ``module`` for ``who``.

    Raises:
        ImportError: it cannot be imported; the message names the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"deq_compile.watch.{who}: expected {module} to be importable, got {type(error).__name__}: {error}. "
            f"Fix: pip install {package}"
        ) from error
