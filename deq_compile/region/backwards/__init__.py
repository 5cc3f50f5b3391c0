"""The backward modes. To add one: a class like those in these files, and ``BACKWARDS.register(Mine())``."""

# ruff: noqa: I001  (messages list the choices in the order in which they are registered)
from . import reuse
from . import jfb, phantom, unroll
from . import reversible

__all__ = ["jfb", "phantom", "reuse", "reversible", "unroll"]
