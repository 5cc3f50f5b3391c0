"""torch's own `while_loop` (a higher-order operator): plain iteration in one compiled program, forward and adjoint.

Where the version can capture it (torch 2.14: `torch._higher_order_ops.cudagraph_conditional_nodes`), it is compiled in the mode
"reduce-overhead", so that a loop may become a WHILE node of a CUDA graph; elsewhere the host asks the device once an iteration.
It does not train by itself: the gradient is the implicit one. What does not depend on the cotangent is computed before the loop.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module

from .workloads import Equilibrium, Layout

MAX_ITER = 400  # plain iteration takes as long as it takes


def in_graphs() -> bool:
    """Whether this version of torch captures its loops as conditional nodes."""
    return importlib.util.find_spec("torch._higher_order_ops.cudagraph_conditional_nodes") is not None


def picard(f: Callable[[Tensor], Tensor], z: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Iterate z (B, D) until |f(z) - z| <= tol |f(z)| in every sample. Returns f's last value, and how often f was called."""
    from torch._higher_order_ops.while_loop import while_loop

    def goes_on(z: Tensor, worst: Tensor, k: Tensor) -> Tensor:
        return (worst > tol) & (k < MAX_ITER)

    def once(z: Tensor, worst: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = f(z)
        return found, ((found - z).norm(dim=1) / (found.norm(dim=1) + 1e-9)).max(), k + 1

    begin = (z.clone(), z.new_full((), torch.inf), torch.zeros((), dtype=torch.int64, device=z.device))
    found, _, k = while_loop(goes_on, once, begin)
    return found, k


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, q: Tensor) -> tuple[Tensor, None]:
        return ctx.adjoint(q), None


class TorchWhile(nn.Module):
    """A workload whose loop is `while_loop`.

    Args:
        model: with its loop, body and injection.
        tol: relative residual of state and adjoint, per sample.
        dry: compile with the backend "aot_eager", which needs no compiler.
    """

    def __init__(self, model: Equilibrium, tol: float, dry: bool) -> None:
        super().__init__()
        self.model, self.tol = model, tol
        how: dict[str, Any] = {"dynamic": False}
        how |= {"backend": "aot_eager"} if dry else {"mode": "reduce-overhead"} if in_graphs() else {}
        self._compiled = torch.compile(self._solve, **how)
        self._adjoint = torch.compile(self._solve_adjoint, **how)
        self._traced: nn.Module | None = None
        self._split: tuple[nn.Module, nn.Module, list[int], list[int]] | None = None
        self.iterations = 0

    def _solve(self, z: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
        assert self._traced is not None
        traced = self._traced
        return picard(lambda z: traced(z, *rest), z, self.tol)

    def _solve_adjoint(self, q: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        assert self._split is not None
        product = self._split[1]
        return picard(lambda w: q + product(w, *kept), torch.zeros_like(q), self.tol)

    def _linearise(self, f: Callable[..., Tensor], w: Tensor, z: Tensor, rest: list[Tensor]) -> list[Tensor]:
        """The values that J^T w is computed from, taken out of the loop: those of the trace that do not depend on w."""
        if self._split is None:

            def vjp(w: Tensor, z: Tensor, *rest: Tensor) -> Tensor:
                found: Tensor = torch.func.vjp(lambda z: f(z, *rest), z)[1](w)[0]
                return found

            self._split = split(_trace(vjp, w, z, *rest))
        first, _, takes, passes = self._split
        given = (w, z, *rest)
        return _apart([*(given[i] for i in passes), *first(*(given[i] for i in takes))])

    def forward(self, *inputs: Tensor) -> Tensor:
        u = self.model.inject(*inputs)
        start = self.model.start(u)
        layout = Layout(start)
        call, names = _Call(self.model, layout), [f"model.{name}" for name, _ in self.model.named_parameters()]
        rest = _apart([*(p.detach() for p in self.model.parameters()), *(t.detach() for t in u)])
        kind = start[0].device.type
        cast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def f(z: Tensor, *rest: Tensor) -> Tensor:
            values = dict(zip(names, rest, strict=False))
            found: Tensor = torch.func.functional_call(call, values, (z, rest[len(names) :]))
            return found

        with torch.no_grad():
            if self._traced is None:  # plain operators on tensors: `while_loop` takes nothing else
                self._traced = _trace(f, layout.pack(start).detach(), *rest)
            z, k = self._compiled(layout.pack(start).detach(), rest)
            z = z.clone()  # a graph's memory is its own
        self.iterations = int(k) if z.device.type == "cpu" else -1  # not asked of a device: that would be timed
        out = layout.pack(self.model.body(layout.unpack(z), u))

        def adjoint(q: Tensor) -> Tensor:
            with torch.autocast(kind, dtype=dtype, enabled=cast):  # a backward runs outside the forward's
                w, _ = self._adjoint(q, self._linearise(f, q, z, rest))
            return w.clone()

        return self.model.read(layout.unpack(_Implicit.apply(out, adjoint)))


class _Call(nn.Module):
    """The body on (B, D) as a module's forward, so that its parameters may be passed in."""

    def __init__(self, model: Equilibrium, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, z: Tensor, u: tuple[Tensor, ...]) -> Tensor:
        return self.layout.pack(self.model.body(self.layout.unpack(z), u))


def _trace(f: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    """A graph of plain operators, nothing of it in place: a loop's body may not change what comes from outside."""
    return make_fx(torch.func.functionalize(f))(*args)


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of those that share memory with an earlier one, which a loop's operands may not."""
    seen: set[int] = set()
    found = []
    for t in tensors:
        at = t.untyped_storage().data_ptr()
        found.append(t.clone() if at in seen else t)
        seen.add(at)
    return found


def split(traced: fx.GraphModule) -> tuple[nn.Module, nn.Module, list[int], list[int]]:
    """Cut a trace of (w, *given) -> J^T w in two: what does not depend on w, and the product from that.

    Returns:
        the first part, the product (w, *passed, *made) -> J^T w, the places among (w, *given) that the first takes, and of
        those that are passed on to the product.
    """
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    depends: set[fx.Node] = {placeholders[0]}
    for node in traced.graph.nodes:
        if any(i in depends for i in node.all_input_nodes):
            depends.add(node)
    both = split_module(traced, traced, lambda node: int(node in depends))
    calls = {n.target: n for n in both.graph.nodes if n.op == "call_module"}
    outer = [n for n in both.graph.nodes if n.op == "placeholder"]
    head, tail = calls["submod_0"], calls["submod_1"]
    first, second = both.get_submodule("submod_0"), both.get_submodule("submod_1")
    takes = [outer.index(n) for n in head.args]
    # The order in which the product wants its arguments: w, places of the trace, values of the first part.
    slots = _slots(tail, head, outer)
    several = any(n.op == "call_function" for n in both.graph.nodes)
    passes = [at for kind, at in slots if kind == "given" and at != 0]

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = second

        def forward(self, w: Tensor, *kept: Tensor) -> Tensor:
            given = {0: w, **dict(zip(passes, kept, strict=False))}
            made = kept[len(passes) :]
            found: Tensor = self.second(*(given[at] if kind == "given" else made[at] for kind, at in slots))
            return found

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = first

        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            made = self.first(*given)
            return tuple(made) if several else (made,)

    return Head(), Product(), takes, passes


def _slots(tail: fx.Node, head: fx.Node, outer: list[fx.Node]) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for argument in tail.args:
        assert isinstance(argument, fx.Node)
        if argument in outer:
            found.append(("given", outer.index(argument)))
        elif argument is head:
            found.append(("made", 0))
        else:  # operator.getitem of the first part
            found.append(("made", int(argument.args[1])))  # type: ignore[arg-type]
    return found
