"""The solvers of the forward, by name. To add one: a class like those beside this file, and ``SOLVERS.register(Mine())``."""

# ruff: noqa: I001  (messages list the choices in the order in which they are registered)
from .base import FLOOR_EPS, SOLVERS, Problem, Solver
from .broyden import BROYDEN
from .anderson import ANDERSON
from .picard import PLAIN
from .auto import AUTO
from .reversible import REVERSIBLE

__all__ = ["ANDERSON", "AUTO", "BROYDEN", "FLOOR_EPS", "PLAIN", "REVERSIBLE", "SOLVERS", "Problem", "Solver"]
