"""Which runner serves a call of a body: compiled for its first sizes, then for whatever has varied, eager beyond a number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deq_compile.compiling import alone

from .body import BodySpec, EagerRunner, Runner
from .layout import Layout
from .shapes import Family, Shapes
from .sizes import Sizes

if TYPE_CHECKING:
    from .program import Program

log = logging.getLogger("deq_compile.region")

# Programs beyond this many for one body are not compiled: a model that is called with ever new sizes must not compile forever.
MAX_COMPILED_SHAPES = 8
# Shapes of one body that are remembered. Runners that compiled nothing of their own are made again, and the oldest of them goes.
MAX_SHAPES = 64


def runner_for(spec: BodySpec, layout: Layout, operands: Sequence[Tensor], sizes: Sequence[int]) -> Runner:
    """The runner of a body for these shapes. Compiled code is shared by all regions whose bodies have one hash."""
    metas = tuple((o.shape, o.stride(), o.dtype, o.device) for o in operands)
    key = (layout, metas, tuple(sizes))
    shapes = spec.shapes
    found = shapes.runners.get(key)
    if found is not None:
        return found
    with alone:
        found = shapes.runners.get(key)
        if found is None:
            found = shapes.runners[key] = _new_runner(spec, shapes, layout, operands, sizes)
            if len(shapes.runners) > MAX_SHAPES:
                oldest = next((k for k, r in shapes.runners.items() if not r.owns_code), None)
                shapes.runners.pop(oldest, None)  # type: ignore[arg-type]
        return found


def _new_runner(spec: BodySpec, shapes: Shapes, layout: Layout, operands: Sequence[Tensor], sizes: Sequence[int]) -> Runner:
    if spec.inner == "eager":
        return EagerRunner(spec, layout, sizes)
    try:
        from .compiled import CompiledRunner
    except ImportError as error:  # a torch without a part that it takes to trace bodies
        log.warning("bodies run eagerly on torch %s: %s", torch.__version__, error)
        return EagerRunner(spec, layout, sizes)
    here = Sizes.of(layout, operands, sizes)
    same = (layout.dtypes, layout.orders, layout.rows, layout.channels_last, len(sizes))
    family = shapes.families.setdefault((*same, *((o.dtype, o.device, o.dim()) for o in operands)), Family())
    free = family.free(here, spec.symbols)

    def another() -> Program:
        """For a runner in use whose program does not serve it."""
        with alone:
            return _known(family, here) or _made(spec, shapes, family, (layout, here, free))

    found = _known(family, here)
    if found is None and shapes.compiled < MAX_COMPILED_SHAPES:
        found = _made(spec, shapes, family, (layout, here, free))
    if found is None:
        log.info("body %s was compiled %d times: new shapes run eagerly", spec.hash, MAX_COMPILED_SHAPES)
        return EagerRunner(spec, layout, sizes)
    return CompiledRunner(here, found, another)


def _known(family: Family, sizes: Sizes) -> Program | None:
    """A program that serves these sizes already."""
    if any(program.failed for program in family.general):
        family.general, family.off = [], True
    return next((program for program in family.general if program.admits(sizes)), None)


def _made(spec: BodySpec, shapes: Shapes, family: Family, call: tuple[Layout, Sizes, dict[int, Any]]) -> Program:
    from .dynamic import AVAILABLE, SymbolicProgram
    from .program import FixedProgram

    layout, sizes, free = call
    shapes.compiled += 1
    if family.off or not free or not AVAILABLE:
        return FixedProgram(spec, layout, sizes, alone)
    family.general.append(SymbolicProgram(spec, layout, sizes, free, alone))
    return family.general[-1]
