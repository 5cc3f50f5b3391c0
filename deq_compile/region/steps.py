"""The reversible iteration of a function that nobody traced, attached to autograd's graph by the exact gradient of its steps.

A step is differentiated where it is made again, so that what f reads has to be known: it is found by watching one evaluation
(`reads.Pure`), and every evaluation of the solve is made with it, so that an f whose inputs cannot be seen is refused before
there is a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import graphs, records
from .attach import reads_more_than
from .body import BodySpec, EagerRunner, Runner
from .call import Call, Prepared, arranged
from .layout import Layout
from .modes import Ambient
from .op import once
from .reads import Pure
from .reversal import Trail, reversed_gradient
from .run import Result, run
from .sharded_calls import held_once
from .site import Site
from .surroundings import NotHere, any_tangent, for_each_of_batch, is_batched

Body = Callable[[list[Tensor]], Sequence[Tensor]]


class Solved(NamedTuple):
    """The state tensors of a fixed point, and what the solve came to."""

    states: list[Tensor]
    result: Result


def refuse_transform(where: str) -> None:
    """Raise: the rules of torch.func are those of a fixed point."""
    raise NotHere(
        f"fixed_point at {where}: solver='reversible' inside of a torch.func transform is not implemented: the derivatives there "
        "are those of the fixed point, not of the solver's steps. Fix: another solver, or torch.autograd outside of transforms"
    )


def solve_by_steps(f: Body, state0: Sequence[Tensor], site: Site) -> Solved:
    """The last term of the reversible iteration of `f` from `state0`, with the exact gradient of its steps: for what f reads, and
    for `state0`.

    Args:
        f: list of state tensors -> tensors of the same shapes; of torch's own functions, reading the same tensors in every call.
        state0: real floating-point tensors; left as they are.
        site: of the call.

    Before the solve f is evaluated twice, to see what it reads.

    Raises:
        NotHere: an f that is not as above, tangents of forward-mode AD, or modules that FSDP2 shards.
    """
    f, here = held_once(f, site.spec.where), graphs.current_device(state0[0].device)

    def as_given(states: list[Tensor]) -> Sequence[Tensor]:
        with graphs.made_current(here):  # the user's code runs as it would without a solver around it
            return f(states)

    count = len(state0)
    with graphs.made_current(state0[0].device):
        with torch.no_grad():
            pure = Pure(as_given, state0, f"at {site.spec.where} with solver='reversible'")
        _check(site.spec.where, [*state0, *pure.operands], sharded=bool(getattr(f, "held", ())))
        body = BodySpec(lambda *given: pure(given[:count], given[count:]), "eager", Ambient.now(), "eager")
        rows, layout = arranged(site, lambda states: pure(states, pure.operands), state0)
        call = Call(site, state0, pure.operands, (), Prepared(rows, layout, EagerRunner(body, layout, ())))
        given = (*state0, *pure.operands)
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if recorded:
            _check_gradients(site.spec.where, pure, state0)
        found = run(call)
    if not recorded:
        return Solved(layout.outputs(found.z), found)
    assert found.saved.trail is not None
    taken = _Taken(site, layout, call.runner, found.saved.trail, found.serial, count)
    return Solved(list(_Steps.apply(taken, layout.outputs(found.z, fresh=True), *given)), found)


def _check(where: str, tensors: Sequence[Tensor], sharded: bool) -> None:
    if any_tangent(tensors):
        raise NotHere(
            f"fixed_point at {where}: solver='reversible' has no forward-mode derivative: the tangent that f's inputs carry "
            "would be lost. Fix: another solver, or reverse mode"
        )
    if sharded:
        raise NotHere(
            f"fixed_point at {where}: solver='reversible' is not implemented in eager mode for an f that calls modules which "
            "FSDP2 shards. Fix: torch.compile(model, backend='deq'), or another solver"
        )


def _check_gradients(where: str, pure: Pure, state0: Sequence[Tensor]) -> None:
    """Raise where gradients would go past the operands: a Function that is given a tensor itself is not given its stand-in."""
    with torch.enable_grad():
        own = [t.detach().requires_grad_(t.requires_grad) for t in (*state0, *pure.operands)]
        images = pure(own[: len(state0)], own[len(state0) :])
    if reads_more_than(images, own):
        raise NotHere(
            f"fixed_point at {where}: expected an f of torch's own functions for solver='reversible', got one that gives a "
            "tensor which needs a gradient to an autograd.Function, a transform or a compiled function of its own. Fix: f of "
            "plain torch operations; or another solver"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Taken:
    """What the backward of an iteration needs beside tensors that autograd keeps; `count` of those are the initial state."""

    site: Site
    layout: Layout
    runner: Runner
    trail: Trail
    serial: int
    count: int

    def gradients(self, cotangents: Sequence[Tensor | None], given: Sequence[Tensor], needs: tuple[bool, ...]) -> list[Tensor]:
        """Of those of `given`, the initial state and what f reads, that are marked in `needs`; zero where there is none."""
        layout, state0, operands = self.layout, given[: self.count], given[self.count :]
        q = [torch.zeros_like(z) if c is None else c for c, z in zip(cotangents, state0, strict=True)]
        z0, flat = layout.flatten(state0).detach(), layout.flatten(q)
        found = reversed_gradient(self.trail, z0, flat, self.runner, operands, needs[self.count :])
        if self.serial:
            records.complete(self.serial, cotangent=flat, w=flat, vjps=found.products, adjoint_message=found.message)
        wanted = [t for t, need in zip(given, needs, strict=True) if need]
        starts = [g for g, need in zip(layout.unflatten(found.start), needs, strict=False) if need]
        return [
            torch.zeros_like(t) if g is None else g.to(t.dtype) for g, t in zip((*starts, *found.operands), wanted, strict=True)
        ]


class _Steps(torch.autograd.Function):
    """The last term of an iteration, by its initial state and by what f reads: (taken, states, *state0, *operands) -> states."""

    @staticmethod
    def forward(ctx: Any, taken: _Taken, states: list[Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.taken = taken
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        taken: _Taken = ctx.taken
        given, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if all(c is None for c in cotangents):
            return (None, None, *(None for _ in needs))

        def gradients(*cotangents: Tensor | None) -> list[Tensor]:
            return taken.gradients(cotangents, given, needs)

        with torch.no_grad(), graphs.made_current(given[0].device):
            found = for_each_of_batch(gradients, *cotangents) if is_batched(cotangents) else gradients(*cotangents)
        if torch.is_grad_enabled():
            found = once(found, (*given, *cotangents), "backward='exact' and derivatives=2 in the call of fixed_point")
        each = iter(found)
        return (None, None, *(next(each) if need else None for need in needs))
