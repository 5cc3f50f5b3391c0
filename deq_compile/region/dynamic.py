"""A body traced with symbols for sizes: compiled once, it serves all shapes that the guards of its trace admit.

Symbols belong to dimensions that have had more than one size, or that the graph around the region has as symbols. Sizes that
have been equal share one; what else has to hold comes out of the trace, as a guard. Sizes 0 and 1 are numbers: they broadcast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deq_compile.torch_parts import (
    SIZES,
    SYMPY_INTERP,
    DimDynamic,
    FakeTensorMode,
    ShapeEnv,
    constant_source,
    lost,
    make_fx,
    sympy_printer,
)

from .body import BodySpec
from .layout import Layout
from .program import Program, distinct
from .sizes import Sizes

AVAILABLE = SIZES not in lost()


class NotDynamic(Exception):
    """A body that cannot be compiled for many sizes at a time."""


class SymbolicProgram(Program):
    """A body's graphs with symbols for some sizes.

    sizes  those of the example at hand
    free   what stands for those that are no constants, by index: equal for sizes that are taken to be equal. Where it is an
           expression of symbols that stand for others, the size is that expression of theirs
    """

    general = True

    def __init__(self, spec: BodySpec, layout: Layout, sizes: Sizes, free: dict[int, Any], lock: Any) -> None:
        super().__init__(spec, lock)
        self.layout, self.example = layout, sizes
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.varies = tuple(i in free for i in range(len(sizes.dims)))
        self.symbols, self.dims = self._symbols(free)
        self._predicate: tuple[int, Callable[[Sizes], bool]] | None = None

    def _symbols(self, free: dict[int, Any]) -> tuple[dict[str, int], list[Any]]:
        """The name of each symbol with the index of a size that it stands for; and all sizes, numbers or made of symbols."""
        known: dict[Any, Any] = {}
        at: dict[str, int] = {}
        dims: list[Any] = list(self.example.dims)
        compound = {i: key for i, key in free.items() if len(getattr(key, "free_symbols", ())) > 0 and not key.is_Symbol}
        for i, key in free.items():
            if i in compound and compound[i].free_symbols <= set(free.values()):
                continue
            source = constant_source(f"size{i}")
            if key not in known:
                known[key] = self.env.create_symbol(dims[i], source, DimDynamic.DYNAMIC)
                at[str(known[key])] = i
            dims[i] = self.env.create_symintnode(known[key], hint=dims[i], source=source)
        for i, key in compound.items():
            if isinstance(dims[i], int):
                dims[i] = self.env.create_symintnode(key.xreplace(known), hint=dims[i])
        return at, dims

    @property
    def stamp(self) -> int:
        return len(self.env.guards)

    def extra(self, sizes: Sizes) -> list[int]:
        """The numbers that stand behind the tensors among the inputs."""
        return [sizes.dims[i] for i in range(sizes.tensors_begin) if self.varies[i]]

    # ---- who may use it

    def admits(self, sizes: Sizes) -> bool:
        """Whether the graphs are right for these sizes: all that was assumed while they were made holds."""
        if self._predicate is None or self._predicate[0] != self.stamp:
            self._predicate = self.stamp, self._compiled_guards()
        return self._predicate[1](sizes)

    def _compiled_guards(self) -> Callable[[Sizes], bool]:
        texts = [f"({self._printed(guard.expr)})" for guard in self.env.guards]
        texts += [f"sizes[{i}] == {self._printed(d.node.expr)}" for i, d in enumerate(self.dims) if isinstance(d, torch.SymInt)]
        texts += [f"sizes[{i}] == {d}" for i, d in enumerate(self.dims) if isinstance(d, int)]
        code = compile(" and ".join(f"({text})" for text in texts) or "True", "<guards of a body>", "eval")

        def holds(sizes: Sizes) -> bool:
            values = {name: sizes.dims[i] for name, i in self.symbols.items()}
            if min(values.values()) < 2 or not sizes.strides_like(self.example, self.varies):
                return False
            return bool(eval(code, SYMPY_INTERP, {**values, "sizes": sizes.dims}))

        return holds

    @staticmethod
    def _printed(expr: Any) -> str:
        return str(sympy_printer().doprint(expr))

    # ---- tracing

    def inputs(self, z: Tensor, operands: Sequence[Tensor]) -> list[Any]:
        """Fake tensors and symbols in the places of the inputs of a call."""
        example, symbolic = self.example, self._layout()
        with self.mode:
            state = torch.empty((symbolic.batch, symbolic.width), dtype=z.dtype, device=z.device)
            fakes = [
                torch.empty_strided(self.dims[span], strides, dtype=o.dtype, device=o.device)
                for o, span, strides in zip(
                    operands, example.spans, example.symbolic_strides(self.dims, self.varies), strict=True
                )
            ]
        return [state, *fakes, *(self.dims[i] for i in range(example.tensors_begin) if self.varies[i])]

    def _layout(self, given: Sequence[Any] | None = None) -> Layout:
        """The layout with symbols for sizes; `given` in their places, in the order of `extra`."""
        dims = self._filled(given)
        shapes, at = [], 0
        for shape in self.layout.shapes:
            shapes.append(tuple(dims[at : at + len(shape)]))
            at += len(shape)
        return dataclasses.replace(self.layout, shapes=tuple(shapes))

    def _filled(self, given: Sequence[Any] | None) -> list[Any]:
        rest = None if given is None else iter(given)
        return [
            next(rest) if rest is not None and free else dim
            for dim, free in zip(self.dims[: self.example.tensors_begin], self.varies, strict=False)
        ]

    def flat(self, z: Tensor, *rest: Any) -> Tensor:
        count = len(self.example.spans)
        operands, given = rest[:count], rest[count:]
        return self.spec.flat(self._layout(given), z, operands, self._filled(given)[self.example.sizes_begin :])

    def trace(self, fn: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
        with self.mode:  # for tensors that are made in the trace
            return make_fx(fn, decomposition_table=self.decompositions(), tracing_mode="real")(*inputs)

    def saved_like(self, forward: fx.GraphModule, saved: Sequence[Any]) -> list[Any]:
        """What the traced forward saves, laid out as the compiled one has it (`saved`, for the example's sizes)."""
        (output,) = [n for n in forward.graph.nodes if n.op == "output"]
        found = []
        for node, real in zip(output.args[0][1:], saved, strict=True):
            value = node.meta["val"]
            if isinstance(value, Tensor) and isinstance(real, Tensor):
                value = self._laid_out(value, real)
            found.append(value)
        return found

    def _laid_out(self, value: Tensor, real: Tensor) -> Tensor:
        strides = real.stride()
        if tuple(_now(s) for s in value.stride()) == strides:
            with self.mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        order = sorted(range(real.dim()), key=lambda d: (-strides[d], d))
        dense = torch.empty_permuted(real.shape, order, device="meta").stride()
        if any(s != d for s, d, n in zip(strides, dense, real.shape, strict=True) if n > 1):
            if any(isinstance(n, torch.SymInt) for n in value.shape):
                raise NotDynamic("a tensor that it saves is padded")
            with self.mode:
                return torch.empty_strided(real.shape, strides, dtype=value.dtype, device=value.device)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        with self.mode:
            made = torch.empty([value.shape[d] for d in order], dtype=value.dtype, device=value.device)
            return made.permute(inverse)

    def retrace(self, graph: Callable[..., Any], inputs: list[Any]) -> fx.GraphModule:
        with self.mode:
            return make_fx(graph, tracing_mode="real")(*distinct(inputs))


def _now(size: Any) -> int:
    """The number that a size of the trace has for the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
