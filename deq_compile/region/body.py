"""One application of a region's body on the flat state, and its vector-Jacobian products.

Three ways to run a body, behind one interface: eager (autograd records the VJPs), the traced ATen graphs as they are
(`aot_eager`), and the same graphs compiled by Inductor. A runner is for one set of shapes; its graphs may serve many.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .modes import Ambient, autograd_recording
from .shapes import Shapes, shapes_of


@dataclasses.dataclass(frozen=True)
class BodySpec:
    """What a body is: a function of state, operands and sizes, its hash, and how to run it.

    call     call(*state, *operands, *sizes) -> tuple of state tensors
    hash     equal for bodies that compute the same
    ambient  modes it was captured under
    inner    "inductor", "aot_eager" or "eager"
    inductor patches for Inductor's configuration, as sorted items
    symbols  what the sizes of states, those given as numbers, and those of operands are in the graph around: an expression of
             symbols, or None for a number; empty where all are numbers. Symbols are compiled as such from the first call on
    """

    call: Callable[..., Sequence[Tensor]]
    hash: str
    ambient: Ambient
    inner: str
    inductor: tuple[tuple[str, Any], ...] = ()
    symbols: tuple[Any, ...] = ()

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The runners of all bodies that compute the same in the same way."""
        return shapes_of((self.hash, self.inner, self.ambient.autocast, self.inductor))

    def flat(self, layout: Layout, z: Tensor, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """f on the flat state: (B, D) -> (B, D), a dense tensor of its own."""
        with self.ambient.autocast_entered():
            return layout.flatten(self.call(*layout.unflatten(z), *operands, *sizes))


class Linearised(abc.ABC):
    """A body linearised at one state: `vjp(w)` = J^T w, and `vjp_full(w)` = (J^T w, gradients of the operands asked for).

    w, J^T w: (B, D). An operand that the body does not depend on has gradient None. `source` is what was linearised, where that
    is known: the runner, and the operands as it was given them.
    """

    source: tuple[Runner, Sequence[Tensor]] | None = None

    @abc.abstractmethod
    def vjp(self, w: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]: ...


class Deferred(Linearised):
    """A body that is linearised when the first product is asked for."""

    def __init__(self, make: Callable[[], Linearised]) -> None:
        self.make = make
        self.found: Linearised | None = None

    def get(self) -> Linearised:
        if self.found is None:
            self.found = self.make()
        return self.found

    def vjp(self, w: Tensor) -> Tensor:
        return self.get().vjp(w)

    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        return self.get().vjp_full(w)


class Evaluations:
    """f on the flat state, (B, D) -> (B, D), for one solve; `count` says how often it was called."""

    def __init__(self, runner: Runner, operands: Sequence[Tensor]) -> None:
        self.runner, self.operands, self.count = runner, operands, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.count += 1
        return self.runner.apply(z, self.operands)

    def linear(self) -> Linearised | None:
        """The body linearised where it was evaluated last, if that is known. It may hold on to that z: it is good as long as z
        does not change."""
        return None

    def value(self) -> Tensor | None:
        """f where it was evaluated last, if that is known."""
        return None


class Runner(abc.ABC):
    """A body for one set of shapes, bound to nothing else: operands come with each call.

    owns_code  whether what was compiled goes when it goes; records: whether autograd records its products anew in every backward
    """

    owns_code = records = False

    def evaluations(self, operands: Sequence[Tensor], needs: tuple[bool, ...] | None) -> Evaluations:
        """f for one solve. With `needs` the last evaluation's linearisation is kept, where that comes for nothing."""
        return Evaluations(self, operands)

    @abc.abstractmethod
    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor: ...

    @abc.abstractmethod
    def evaluate_and_linearise(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Tensor, Linearised]:
        """f(z), and f linearised at z; with the gradients of the operands marked in `needs`. It may hold on to z and to f(z)."""

    def linearise(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> Linearised:
        return self.evaluate_and_linearise(z, operands, needs)[1]


class EagerRunner(Runner):
    records = True

    def __init__(self, spec: BodySpec, layout: Layout, sizes: Sequence[int]) -> None:
        self.spec, self.layout, self.sizes = spec, layout, tuple(sizes)

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        # Autocast would remember what it makes of a parameter here, where no gradients are recorded, and the user's code would
        # get that: a weight without its gradient, in silence.
        if any(enabled for _, enabled, _ in self.spec.ambient.autocast):
            operands = [o.detach() for o in operands]
        with torch.no_grad():
            return self.spec.flat(self.layout, z, operands, self.sizes)

    def evaluate_and_linearise(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Tensor, Linearised]:
        with autograd_recording():
            state = z.detach().requires_grad_()
            own = [o.detach().requires_grad_(need) for o, need in zip(operands, needs, strict=True)]
            out = self.spec.flat(self.layout, state, own, self.sizes)
        return out.detach(), EagerLinearised(out, state, [o for o, need in zip(own, needs, strict=True) if need])


class EagerLinearised(Linearised):
    def __init__(self, out: Tensor, state: Tensor, operands: list[Tensor]) -> None:
        self.out, self.state, self.operands = out, state, operands

    def vjp(self, w: Tensor) -> Tensor:
        if not self.out.requires_grad:
            return torch.zeros_like(w)
        (jtw,) = torch.autograd.grad(self.out, self.state, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if jtw is None else jtw

    def vjp_full(self, w: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        if not self.out.requires_grad:
            return torch.zeros_like(w), [None] * len(self.operands)
        jtw, *grads = torch.autograd.grad(self.out, [self.state, *self.operands], w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if jtw is None else jtw, list(grads)
