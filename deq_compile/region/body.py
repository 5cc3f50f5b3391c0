"""One application of a region's body on the flat state, and its vector-Jacobian products.

Three ways to run a body, behind one interface: eager (autograd records the VJPs), the traced ATen graphs as they are
(`aot_eager`), and the same graphs compiled by Inductor. Shapes are concrete here: one runner for each set of shapes.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .modes import Ambient, autograd_recording

log = logging.getLogger("deq_compile.region")

# Shapes beyond this many for one body run it eagerly: a model that is called with ever new sizes must not compile forever.
MAX_COMPILED_SHAPES = 8
# Shapes of one body that are remembered. Eager runners cost nothing to make again, and the oldest of them goes.
MAX_SHAPES = 64


@dataclasses.dataclass(frozen=True)
class BodySpec:
    """What a body is: a function of state, operands and sizes, its hash, and how to run it.

    call     call(*state, *operands, *sizes) -> tuple of state tensors
    hash     equal for bodies that compute the same
    ambient  modes it was captured under
    inner    "inductor", "aot_eager" or "eager"
    inductor patches for Inductor's configuration, as sorted items
    """

    call: Callable[..., Sequence[Tensor]]
    hash: str
    ambient: Ambient
    inner: str
    inductor: tuple[tuple[str, Any], ...] = ()

    @functools.cached_property
    def shapes(self) -> _Shapes:
        """The runners of all bodies that compute the same in the same way."""
        key = (self.hash, self.inner, self.ambient.autocast, self.inductor)
        with _lock:
            found = _bodies.get(key)
            if found is None:
                found = _bodies[key] = _Shapes()
            return found

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
    """A body for one set of shapes, bound to nothing else: operands come with each call."""

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
    def __init__(self, spec: BodySpec, layout: Layout, sizes: Sequence[int]) -> None:
        self.spec, self.layout, self.sizes = spec, layout, tuple(sizes)

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
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


class _Shapes:
    """The runners of one body, by shapes. `compiled` counts those that were compiled, which are never given up for new ones."""

    def __init__(self) -> None:
        self.runners: dict[tuple[Any, ...], Runner] = {}
        self.compiled = 0


# Held by the specs of all bodies with that hash, and gone with the last.
_bodies: weakref.WeakValueDictionary[tuple[Any, ...], _Shapes] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def runner_for(spec: BodySpec, layout: Layout, operands: Sequence[Tensor], sizes: Sequence[int]) -> Runner:
    """The runner of a body for these shapes. Compiled code is shared by all regions whose bodies have one hash."""
    metas = tuple((o.shape, o.stride(), o.dtype, o.device) for o in operands)
    key = (layout, metas, tuple(sizes))
    shapes = spec.shapes
    found = shapes.runners.get(key)
    if found is not None:
        return found
    with _lock:
        found = shapes.runners.get(key)
        if found is None:
            found = shapes.runners[key] = _new_runner(spec, shapes, layout, sizes)
            if len(shapes.runners) > MAX_SHAPES:
                oldest = next((k for k, r in shapes.runners.items() if isinstance(r, EagerRunner)), None)
                shapes.runners.pop(oldest, None)  # type: ignore[arg-type]
        return found


def _new_runner(spec: BodySpec, shapes: _Shapes, layout: Layout, sizes: Sequence[int]) -> Runner:
    if spec.inner == "eager":
        return EagerRunner(spec, layout, sizes)
    if shapes.compiled >= MAX_COMPILED_SHAPES:
        log.info("body %s was compiled for %d sets of shapes: new ones run eagerly", spec.hash, MAX_COMPILED_SHAPES)
        return EagerRunner(spec, layout, sizes)
    shapes.compiled += 1
    try:
        from .compiled import CompiledRunner
    except ImportError as error:  # a torch without a part that it takes to trace bodies
        log.warning("bodies run eagerly on torch %s: %s", torch.__version__, error)
        return EagerRunner(spec, layout, sizes)
    return CompiledRunner(spec, layout, sizes, _lock)


def clear() -> None:
    """Forget all compiled bodies."""
    with _lock:
        for shapes in list(_bodies.values()):
            shapes.runners.clear()
            shapes.compiled = 0
