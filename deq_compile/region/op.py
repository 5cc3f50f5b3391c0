"""The region as a pair of opaque operators, `deq::solve` and `deq::solve_backward`, in one whole graph.

    solve(Tensor[] state0, Tensor[] operands, SymInt[] sizes, str region) -> [state..., ticket, solve_info, held...]

state  fresh tensors of the shapes of state0, in the memory orders of the region
ticket (4,) int64 on the CPU: iterations of a loop that was kept (0: solved), rows, serial number of the record, and that of the
       forward where hooks on saved tensors are at work (0 elsewhere)
solve_info  (B, 3) float32, stopping residual, iterations and status of each sample; all rows equal where the batch is one system
held   one tensor where the region records gradients, none otherwise: the flat state in one dimension and in the solver's dtype,
       in memory of its own. The backward reads this one: the user may write to `state`, or through a view of it

What a backward needs is an output or an input: forward, forward, backward, backward and retain_graph are right. The factors,
whose size is known when the solve has ended, and the linearised body hang on the ticket (`run.SavedForBackward`), which autograd
saves for the backward, and die with it. So does the site, which may have no other owner by then. Where a copy of the ticket
arrives there (hooks on saved tensors), the adjoint is solved without factors, or, where the gradient is made of them
(`backward_tol=inf`), the region is solved again; what the first backward has settled is found by the forward's number.
"""

from __future__ import annotations

import array
import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deq_compile.solve_info import COLUMNS
from deq_compile.torch_parts import (
    after_autograd_keyset,
    after_inplace_keyset,
    below_autograd,
    dense_keys,
    forward_mode,
    is_view,
    pytree,
    saved_tensors_hooks,
)

from . import graphs, run
from .backward import keep, kept
from .counts import enter
from .layout import flat_dtype
from .outputs import Outputs
from .site import await_backward
from .site import site as find_site
from .surroundings import NO_TANGENT, NO_VMAP, NotHere, any_tangent, for_each_of_batch

_TAGS = tuple(
    tag for tag in (getattr(torch.Tag, name, None) for name in ("pt2_compliant_tag", "cudagraph_unsafe")) if tag is not None
)

library = torch.library.Library("deq", "DEF")
library.define("solve(Tensor[] state0, Tensor[] operands, SymInt[] sizes, str region) -> Tensor[]", tags=_TAGS)
library.define(
    "solve_backward(Tensor?[] cotangents, Tensor[] state, Tensor ticket, Tensor[] state0, Tensor[] operands, SymInt[] sizes, "
    "str region, bool[] needs_state0, bool[] needs_operands) -> Tensor[]",
    tags=_TAGS,
)

Call = Callable[..., Sequence[Tensor]]


def _rows(state0: Sequence[Tensor]) -> Any:
    """Rows of `about`: what a user takes for the batch."""
    return state0[0].shape[0] if state0[0].dim() else 1


def _solve(state0: list[Tensor], operands: list[Tensor], sizes: list[int], region: str) -> list[Tensor]:
    site = find_site(region)
    sizes = enter(site, sizes)
    hooked = site.spec.grad and saved_tensors_hooks(False) is not None
    # what a body saves that runs in eager mode is the region's own: a checkpoint counts it, and calls differ in it
    own = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is) if hooked else contextlib.nullcontext()
    with graphs.made_current(state0[0].device), own:
        done = run.run_forward(site, state0, operands, sizes)
    solve_info, rows = done.solve_info, _rows(state0)
    number = 0
    if hooked:
        await_backward(site)
        number = keep(done.saved.settled)
    numbers = array.array("q", (done.ticket.kept, done.ticket.rows, done.ticket.serial, number))
    ticket = torch.frombuffer(numbers, dtype=torch.int64)
    ticket.saved, ticket.site = done.saved, site  # type: ignore[attr-defined]
    if solve_info.shape[0] != rows:
        solve_info = solve_info[:1].repeat(rows, 1)
    return Outputs(done.states, ticket, solve_info, () if done.held is None else (done.held,)).flat


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _solve_fake(state0: list[Tensor], operands: list[Tensor], sizes: list[Any], region: str) -> list[Tensor]:
    spec = find_site(region).spec
    states = [
        torch.empty_permuted(s.shape, order, dtype=dtype, device=s.device)
        for s, order, dtype in zip(state0, spec.orders, spec.dtypes, strict=True)
    ]
    info = state0[0].new_empty((_rows(state0), COLUMNS), dtype=torch.float32)
    elements = sum(s.numel() for s in state0)
    held = [state0[0].new_empty((elements,), dtype=flat_dtype(spec.dtypes))] if spec.grad else []
    return Outputs(states, torch.empty(4, dtype=torch.int64, device="cpu"), info, held).flat


def _solve_backward(*arguments: Any) -> list[Tensor]:
    """The kernel of `deq::solve_backward`; its arguments are those of the operator's schema, in order."""
    cotangents, state, ticket, state0, operands, sizes, region, needs_state0, needs_operands = arguments
    iterations, rows, serial, number = ticket.tolist()
    numbers = run.Ticket(iterations, bool(rows), serial, number)
    site = getattr(ticket, "site", None) or find_site(region)
    sizes = enter(site, sizes)
    saved = getattr(ticket, "saved", None) or run.SavedForBackward(settled=kept(number))
    inputs = run.BackwardInputs(state, state0, operands, sizes, numbers, saved)
    with graphs.made_current(state0[0].device):
        grad_state0, grad_operands = run.run_backward(site, cotangents, inputs, tuple(needs_operands))
    wanted = [s for s, need in zip(state0, needs_state0, strict=True) if need]
    found: list[Tensor | None] = [None] * len(wanted)
    if grad_state0 is not None:
        found = [g for g, need in zip(grad_state0, needs_state0, strict=True) if need]
    wanted += [o for o, need in zip(operands, needs_operands, strict=True) if need]
    return _fresh([*found, *grad_operands], wanted)


def _fresh(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with exactly the fake's strides, none of which shares memory with another."""
    out: list[Tensor] = []
    seen: set[int] = set()
    for grad, tensor in zip(grads, like, strict=True):
        if grad is None:
            out.append(torch.zeros_like(tensor))
            continue
        storage = grad.untyped_storage().data_ptr()
        own = not is_view(grad) and storage not in seen and grad.dtype == tensor.dtype
        out.append(grad if own and _strides_of_empty_like(grad, tensor) else torch.empty_like(tensor).copy_(grad))
        seen.add(storage)
    return out


def _strides_of_empty_like(grad: Tensor, tensor: Tensor) -> bool:
    """Whether `grad` has the strides of `empty_like(tensor)`, without allocating that where the answer is plain to see."""
    if grad.stride() == tensor.stride() and grad.shape == tensor.shape and tensor.is_contiguous():
        return True  # empty_like keeps the strides of what is dense
    return grad.stride() == torch.empty_like(tensor, device="meta").stride()


def _solve_backward_fake(*arguments: Any) -> list[Tensor]:
    _, _, _, state0, operands, _, _, needs_state0, needs_operands = arguments
    tensors, needs = [*state0, *operands], [*needs_state0, *needs_operands]
    return [torch.empty_like(t) for t, need in zip(tensors, needs, strict=True) if need]


class _Solve(torch.autograd.Function):
    """`deq::solve` with its tensors as arguments of their own: autograd sees those only."""

    @staticmethod
    def forward(ctx: Any, call: Call, count: int, sizes: list[int], region: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            found = call(list(tensors[:count]), list(tensors[count:]), sizes, region)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[count:])
        outputs = Outputs.of(found, count)
        ctx.save_for_backward(outputs.ticket, *(outputs.held or outputs.states), *tensors)
        ctx.sizes, ctx.region, ctx.count = sizes, region, count
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (ticket, *saved), k = ctx.saved_tensors, ctx.count
        cotangents, needs = list(grads[:k]), ctx.needs_input_grad[4:]
        if all(c is None for c in cotangents):
            return (None,) * (4 + len(needs))
        held, tensors = saved[: -len(needs)], saved[-len(needs) :]
        found = iter(
            torch.ops.deq.solve_backward.default(
                cotangents, held, ticket, tensors[:k], tensors[k:], ctx.sizes, ctx.region, list(needs[:k]), list(needs[k:])
            )
        )
        return (None, None, None, None, *(next(found) if need else None for need in needs))


def _below_autograd(keyset: Any, op: Any, kernel: Call) -> Call:
    """What runs when autograd has done its part: the kernel itself, where no mode or wrapper tensor comes before it."""
    if dense_keys and (keyset & after_inplace_keyset).raw_repr() in dense_keys:
        return kernel
    return functools.partial(op.redispatch, keyset & after_autograd_keyset)


def _solve_autograd(keyset: Any, state0: list[Tensor], operands: list[Tensor], sizes: list[int], region: str) -> Sequence[Tensor]:
    """By hand: torch.library's own takes lists apart with pytree and always goes through the dispatcher once more."""
    call = _below_autograd(keyset, torch.ops.deq.solve.default, _solve)
    if forward_mode() and any_tangent((*state0, *operands)):
        return _loop_itself(region, state0, operands, sizes)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*state0, *operands)):
        return list(_Solve.apply(call, len(state0), sizes, region, *state0, *operands))
    with below_autograd():
        return call(state0, operands, sizes, region)


def _loop_itself(region: str, state0: list[Tensor], operands: list[Tensor], sizes: list[int]) -> Sequence[Tensor]:
    """Forward-mode AD: the user's own iterations, through which tangents flow, and gradients as well.

    Raises:
        NotHere: a region that has no count of iterations of its own.
    """
    site = find_site(region)
    sizes, spec = enter(site, sizes), site.spec
    if spec.iterations is None or spec.config.semantics != "loop":
        raise NotHere(NO_TANGENT)
    states: Sequence[Tensor] = [s.clone() for s in state0]
    with spec.body.ambient.autocast_entered():
        for _ in range(spec.iterations):
            states = spec.body.call(*states, *operands, *sizes)
    info = state0[0].new_full((_rows(state0), COLUMNS), -1.0, dtype=torch.float32)
    held = [torch.cat([s.detach().flatten() for s in states]).to(flat_dtype(spec.dtypes))] if spec.grad else []
    return Outputs(states, torch.tensor((1, 0, 0, 0)), info, held).flat


IN_EAGER_MODE = "deq_compile.fixed_point(f, z0, derivatives=2) in eager mode, or the loop itself there"


def once(grads: Sequence[Tensor], sources: Iterable[Tensor | None], fix: str = IN_EAGER_MODE) -> list[Tensor]:
    """Gradients that nobody can differentiate with respect to `sources`, or to anything that those were made of; who tries gets
    `fix` with the error.

    Autograd skips a node that leads to none of the inputs it is asked about: the node that raises has to lead to all of them.
    """
    anchors = [s for s in sources if isinstance(s, Tensor) and s.requires_grad]
    return list(_Once.apply(len(grads), fix, *grads, *anchors)) if anchors and grads else list(grads)


class _Once(torch.autograd.Function):
    """Passes gradients on, and raises where somebody differentiates them."""

    @staticmethod
    def forward(ctx: Any, count: int, fix: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.fix = fix
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        raise RuntimeError(
            "a double backward through a fixed-point region is not implemented: the implicit gradient would have to be "
            f"differentiated in turn. Fix: {ctx.fix}"
        )


def _solve_backward_autograd(keyset: Any, *args: Any) -> Sequence[Tensor]:
    """Autograd's keys stay in, since eager bodies record their VJPs."""
    call = _below_autograd(keyset, torch.ops.deq.solve_backward.default, _solve_backward)
    if not torch.is_grad_enabled():
        return call(*args)
    with torch.no_grad():
        grads = call(*args)
    return once(grads, (t for a in args if isinstance(a, list) for t in a))


def _solve_backward_batched(*args: Any) -> list[Tensor]:
    """Batched cotangents (`is_grads_batched`, `jacobian(vectorize=True)`): one backward after the other."""
    return for_each_of_batch(torch.ops.deq.solve_backward.default, *args)


def _solve_backward_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
    """The same for torch.func.vmap, which has taken its tensors apart already."""

    def select(index: int) -> Any:
        return pytree.tree_map(lambda t, d: t if d is None else t.select(d, index), args, in_dims, is_leaf=lambda t: t is None)

    found = [torch.ops.deq.solve_backward.default(*select(i)) for i in range(info.batch_size)]
    return [torch.stack(parts) for parts in zip(*found, strict=True)], [0] * len(found[0])


def _solve_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotHere(NO_VMAP)


library.impl("solve", _solve, "CompositeExplicitAutograd")
library.impl("solve", _solve_autograd, "Autograd", with_keyset=True)
library.impl("solve_backward", _solve_backward, "CompositeExplicitAutograd")
library.impl("solve_backward", _solve_backward_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("deq::solve", _solve_fake, lib=library)
torch.library.register_fake("deq::solve_backward", _solve_backward_fake, lib=library)
library.impl("solve_backward", _solve_backward_batched, "Batched")
torch.library.register_vmap("deq::solve_backward", _solve_backward_vmap, lib=library)
torch.library.register_vmap("deq::solve", _solve_vmap, lib=library)
solve_op = torch.ops.deq.solve.default
