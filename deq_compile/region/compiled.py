"""Runs a body by its traced graphs: a program, bound to the sizes of a call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .body import Evaluations, Linearised, Runner
from .program import Call, Joint, Program
from .sizes import Sizes

log = logging.getLogger("deq_compile.region")


class CompiledRunner(Runner):
    """A body for one set of shapes.

    program  its graphs, which may serve other shapes as well
    replace  gives another program where this one fails, or has learnt that it does not serve these shapes
    """

    def __init__(self, sizes: Sizes, program: Program, replace: Callable[[], Program]) -> None:
        self.sizes, self.replace = sizes, replace
        self._use(program)

    def _use(self, program: Program) -> None:
        self.program, self.stamp, self.extra = program, program.stamp, program.extra(self.sizes)

    @property
    def owns_code(self) -> bool:  # type: ignore[override]
        return not self.program.general

    def _made(self, make: Callable[[], Any]) -> Any:
        """What the program makes; that of another program where this one does not serve these sizes."""
        while True:
            program = self.program
            if self._admitted():
                try:
                    found = make()
                except Exception as error:
                    if not program.general:
                        raise
                    log.info("body %s is compiled for each size by itself: %s", program.spec.hash, error)
                    program.failed = True
                else:
                    if self._admitted():  # what was made may have come with more guards
                        return found
            self._use(self.replace())

    def _admitted(self) -> bool:
        if self.program.stamp != self.stamp:
            if not self.program.admits(self.sizes):
                return False
            self.stamp = self.program.stamp
        return True

    def plain(self, z: Tensor, operands: Sequence[Tensor]) -> Call:
        found: Call = self._made(lambda: self.program.plain(z, operands))
        return found

    def joint(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> Joint:
        found: Joint = self._made(lambda: self.program.joint([z, *operands, *self.extra], needs))
        return found

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.apply(z, operands)
        z = z.contiguous()
        found: Tensor = self.plain(z, operands)([z, *operands, *self.extra])[0]
        return found

    def evaluations(self, operands: Sequence[Tensor], needs: tuple[bool, ...] | None) -> Evaluations:
        return Evaluations(self, operands) if needs is None else LinearisingEvaluations(self, operands, needs)

    def evaluate_and_linearise(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Tensor, Linearised]:
        evaluations = LinearisingEvaluations(self, operands, needs)
        value, linear = evaluations(z), evaluations.linear()
        assert linear is not None
        return value, linear


class LinearisingEvaluations(Evaluations):
    """Evaluations by the forward that saves what the products need: nothing but the last call's is kept."""

    def __init__(self, runner: CompiledRunner, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> None:
        super().__init__(runner, operands)
        self.compiled, self.needs = runner, needs
        self.calls: Joint | None = None
        self.last: Sequence[Any] = ()

    def __call__(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(z)
        self.count += 1
        z = z.contiguous()
        if self.calls is None:
            self.calls = self.compiled.joint(z, self.operands, self.needs)
        self.last = ()  # or two sets of saved tensors would be alive at a time
        self.last = self.calls.forward([z, *self.operands, *self.compiled.extra])
        found: Tensor = self.last[0]
        return found

    def linear(self) -> Linearised | None:
        if self.calls is None or not self.last:
            return None
        saved = self.calls.saved(self.last[1:])
        return CompiledLinearised((self.runner, self.operands), saved, self.calls.state, self.calls.full)

    def value(self) -> Tensor | None:
        return self.last[0] if self.last else None


class CompiledLinearised(Linearised):
    def __init__(self, source: tuple[Runner, Sequence[Tensor]], saved: Sequence[Any], state: Call, full: Call) -> None:
        self.source, self.saved, self.state, self.full = source, saved, state, full

    def vjp(self, w: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.vjp(w)
        return self.state([*self.saved, w.contiguous()])[0]

    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.vjp_full(w)
        jtw, *grads = self.full([*self.saved, w.contiguous()])
        return jtw, grads
