"""The map of the compiler: which passes a graph goes through, in order, and what each is for.

Twice over a graph: first for what capture has marked (calls of solvers, `fixed_point`, loops whose exit depends on data), then
for what is repeated in it (loops of a fixed count, which Dynamo has unrolled).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from deq_compile.region.modes import Ambient

from .absorb import Absorb
from .base import Pass
from .counts import Counts
from .declared import FindDeclared
from .exits import Exits
from .extract import Extract
from .find_loops import FindLoops
from .functionalise import Functionalise
from .hoist import Hoist
from .inline import InlineCheckpoints
from .judge import Judge
from .masks import Masks
from .take_hooks import TakeHooks
from .unroll_while import UnrollWhile


@dataclass(frozen=True)
class Work:
    """What passes are made for.

    gm     the module whose graph is rewritten
    start  the modes at the beginning of the graph
    skip   sites of operators that are not to be written out again
    """

    gm: fx.GraphModule
    start: Ambient
    skip: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Step:
    """One pass of the pipeline, and its purpose in one line."""

    make: Callable[[Work], Pass]
    purpose: str


MARKED = (
    Step(lambda w: InlineCheckpoints(w.gm), "a checkpoint's body that holds a region stands in the graph itself"),
    Step(lambda w: Functionalise(), "writes in place become results, so that a body is a function"),
    Step(lambda w: UnrollWhile(w.gm, w.skip), "torch.while_loop becomes a marked region"),
    Step(lambda w: TakeHooks(), "a hook that solves the adjoint of a marked solve is taken over with it"),
    Step(lambda w: FindDeclared(), "what lies between two markers is a region, or there is a reason why not"),
    Step(lambda w: Judge(w.start), "a body that draws, writes, or changes its shapes is refused, with the line"),
    Step(lambda w: Extract(w.gm), "a body becomes a graph of its own, with its operands and its hash"),
)
REPEATED = (
    Step(lambda w: FindLoops(), "like segments, one feeding the next, are a loop"),
    Step(lambda w: Counts(), "an integer that counts the iterations is no part of the state"),
    Step(lambda w: Masks(w.gm), "a mask that freezes converged samples is no part of the state"),
    Step(lambda w: Exits(w.gm), "what ends a loop is its test, if it asks how far z and f(z) are apart"),
    Step(lambda w: Absorb(), "iterations before the first test, of the same body, are part of the loop"),
    Step(lambda w: TakeHooks(loops=True), "a hook that solves the adjoint of a loop is taken over with it"),
    Step(lambda w: Judge(w.start), "a body that draws, writes, or changes its shapes is refused, with the line"),
    Step(lambda w: Hoist(), "what does not depend on the state is computed once, ahead of the solve"),
    Step(lambda w: Extract(w.gm), "a body becomes a graph of its own, with its operands and its hash"),
)
ROUNDS = (MARKED, REPEATED)
