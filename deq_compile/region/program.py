"""Bodies and their VJPs as ATen graphs, traced once and called without Dynamo's guards.

One joint graph of the body is split by the min-cut partitioner into `forward(z, operands) -> f, saved` and a backward
from which two graphs are taken: the state's VJP (called many times) and the VJP of state and operands (called once).
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import functionalize

from deq_compile.compiling import in_room
from deq_compile.kernels import ahead, remembered
from deq_compile.torch_parts import (
    BODIES,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    TracingContext,
    lost,
    make_fx,
    partition,
    pytree,
    rename_node,
    schema_of,
    tracing,
)

from . import lookups, rewritten
from .body import BodySpec
from .layout import Layout
from .modes import autograd_recording, functionalising
from .sizes import Sizes

Call = Callable[[list[Any]], Sequence[Any]]

if BODIES in lost():  # who imports this goes on without
    raise ImportError(lost()[BODIES])

# The engines capture bodies themselves: an outer mode="reduce-overhead" must not make a graph, or a partition, of each.
# Generated code need not check sizes in every iteration: operands are laid out as in the trace (a runner is found by their shapes
# and strides), saved tensors come from the compiled forward itself, and states and cotangents are made contiguous by the runner.
OWN_PATCHES = {"triton.cudagraphs": False, "graph_partition": False, "size_asserts": False}


class Joint(NamedTuple):
    """A body that saves what its products need.

    forward  [z, *operands, *numbers] -> (f, *found)
    state    [*saved, w] -> J^T w
    full     [*saved, w] -> J^T w, and the gradients of operands
    order    where each of `saved` stands among `found`
    """

    forward: Call
    state: Call
    full: Call
    order: tuple[int, ...]

    def saved(self, found: Sequence[Any]) -> Sequence[Any]:
        return found if self.order == tuple(range(len(found))) else [found[i] for i in self.order]


class Program(abc.ABC):
    """The graphs of a body: its value, and its value with products for each set of operands that need gradients."""

    def __init__(self, spec: BodySpec, lock: Any) -> None:
        self.spec, self.lock = spec, lock
        self._plain: Call | None = None
        self._joint: dict[tuple[bool, ...], Joint] = {}
        self._looks_up = False

    general = False  # whether it serves more than one set of shapes
    failed = False  # a general one that could not be made

    @property
    def stamp(self) -> int:
        """Another one when the program may have ceased to be right for sizes that it admitted."""
        return 0

    @abc.abstractmethod
    def extra(self, sizes: Sizes) -> list[int]:
        """The numbers that stand behind the tensors among the inputs of a call with these sizes."""

    @abc.abstractmethod
    def admits(self, sizes: Sizes) -> bool: ...

    @abc.abstractmethod
    def inputs(self, z: Tensor, operands: Sequence[Tensor]) -> list[Any]:
        """What to trace with, in the places of a call's inputs."""

    @abc.abstractmethod
    def flat(self, z: Tensor, *rest: Any) -> Tensor: ...

    @abc.abstractmethod
    def trace(self, fn: Callable[..., Any], *inputs: Any) -> fx.GraphModule: ...

    @abc.abstractmethod
    def retrace(self, graph: Callable[..., Any], inputs: list[Any]) -> fx.GraphModule: ...

    @abc.abstractmethod
    def saved_like(self, forward: fx.GraphModule, saved: Sequence[Any]) -> list[Any]:
        """What to trace the products with in the places of `saved`, which the compiled forward has returned."""

    def plain(self, z: Tensor, operands: Sequence[Tensor]) -> Call:
        """A call of [z, *operands, *numbers] -> (f,)."""
        if self._plain is None:
            with self.lock:
                self._plain = in_room(self._compile_plain, z, operands)
        return self._plain

    def joint(self, inputs: list[Any], needs: tuple[bool, ...]) -> Joint:
        """For a call's inputs, [z, *operands, *numbers]."""
        found = self._joint.get(needs)
        if found is None:
            with self.lock:
                found = self._joint[needs] = in_room(self._compile_joint, inputs, needs)
        return found

    def _compile_plain(self, z: Tensor, operands: Sequence[Tensor]) -> Call:
        return self._finish(self._without_writes(lambda *a: (self.flat(*a),), *distinct(self.inputs(z, operands))))

    def _compile_joint(self, real: list[Any], needs: tuple[bool, ...]) -> Joint:
        tensors = 1 + len(needs)

        def joint(primals: list[Any], tangents: list[Tensor]) -> list[Tensor]:
            with autograd_recording():
                wanted = (True, *needs)
                own = [p.detach().requires_grad_(w) for p, w in zip(primals, wanted, strict=False)]
                out = self.flat(*own, *primals[tensors:])
                chosen = [p for p, w in zip(own, wanted, strict=True) if w]
                if not out.requires_grad:
                    grads: Sequence[Tensor | None] = [None] * len(chosen)
                else:
                    grads = torch.autograd.grad(out, chosen, tangents, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)]
            return [out.detach(), *filled]

        inputs = self.inputs(real[0], real[1:tensors])
        graph = self._without_writes(joint, distinct(inputs), distinct(inputs[:1]))
        _name_placeholders(graph, len(inputs))
        graph.graph.eliminate_dead_code()
        with tracing(TracingContext(_fake_mode(graph))):
            forward, backward = partition(graph, None, num_fwd_outputs=1)
        ready = self._finish(forward)
        # The compiled forward may lay out what it saves differently than the traced one: go on from what it returns.
        saved = self.saved_like(forward, list(ready(list(real)))[1:])
        order = _order_of_saved(forward, backward)
        examples = [*(saved[i] for i in order), inputs[0]]
        products = (_outputs_only(backward, list(range(count))) for count in (1, 1 + sum(needs)))
        state, full = (self._finish(self.laid_out(graph, examples)) for graph in products)
        return Joint(ready, state, full, order)

    def laid_out(self, graph: fx.GraphModule, examples: list[Any]) -> fx.GraphModule:
        """A graph of products for saved tensors that lie in memory as these do."""
        return self.retrace(_without_views(graph), examples)

    def decompositions(self) -> Any:
        if self.spec.inner != "inductor":
            return None
        from deq_compile.torch_parts import select_decomp_table

        return select_decomp_table() if select_decomp_table is not None else None

    def _without_writes(self, fn: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
        """The trace. The partitioner and Inductor expect graphs without writes; a derivative may hold them (that of std does)."""
        graph = self.trace(fn, *inputs)
        self._looks_up = lookups.by_state(graph)
        if not _writes(graph):
            return graph

        def run(*tensors: Any) -> Any:
            return fx.Interpreter(graph).run(*tensors, enable_io_processing=False)

        with functionalising():
            return self.retrace(functionalize(run, remove="mutations"), pytree.tree_leaves(inputs))

    def _finish(self, graph: fx.GraphModule) -> Call:
        """A function of a list of inputs. Inductor's is called below its wrapper of guards."""
        graph.graph.eliminate_dead_code()
        from deq_compile.torch_parts import compile_fx_inner, inductor_config

        if self.spec.inner != "inductor" or self._looks_up or compile_fx_inner is None or inductor_config is None:
            graph.recompile()
            forward = graph.forward  # below the hooks of modules, whose users expect tensors that autograd made
            return lambda inputs: forward(*inputs)
        ahead.wait_for_look()
        rewritten.for_inductor(graph)
        fake = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        with tracing(TracingContext(_fake_mode(graph))), inductor_config.patch({**dict(self.spec.inductor), **OWN_PATCHES}):
            compiled = compile_fx_inner(graph, fake)
        remembered.keep()
        return getattr(compiled, "current_callable", None) or compiled


class FixedProgram(Program):
    """A body's graphs for one set of shapes."""

    def __init__(self, spec: BodySpec, layout: Layout, sizes: Sizes, lock: Any) -> None:
        super().__init__(spec, lock)
        self.layout, self.sizes = layout, sizes

    def extra(self, sizes: Sizes) -> list[int]:
        return []

    def admits(self, sizes: Sizes) -> bool:
        return sizes == self.sizes

    def inputs(self, z: Tensor, operands: Sequence[Tensor]) -> list[Any]:
        return [z, *operands]

    def flat(self, z: Tensor, *rest: Any) -> Tensor:
        return self.spec.flat(self.layout, z, rest, self.sizes.given)

    def trace(self, fn: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
        return make_fx(fn, decomposition_table=self.decompositions(), tracing_mode="fake")(*inputs)

    def retrace(self, graph: Callable[..., Any], inputs: list[Any]) -> fx.GraphModule:
        return make_fx(graph, tracing_mode="fake")(*distinct(inputs))

    def laid_out(self, graph: fx.GraphModule, examples: list[Any]) -> fx.GraphModule:
        traced = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
        alike = all(_same_layout(a, b) for a, b in zip(traced, examples, strict=True))
        return graph if alike else super().laid_out(graph, examples)

    def saved_like(self, forward: fx.GraphModule, saved: Sequence[Any]) -> list[Any]:
        return list(saved)


def _order_of_saved(forward: fx.GraphModule, backward: fx.GraphModule) -> tuple[int, ...]:
    """Where each input of the backward but the cotangent stands behind f among the outputs of the forward.

    The partitioner keeps the order among tensors and among numbers, and has numbers last there and first here.
    """
    (output,) = [n for n in forward.graph.nodes if n.op == "output"]
    inputs = [n for n in backward.graph.nodes if n.op == "placeholder"][:-1]
    found = [isinstance(n.meta.get("val"), Tensor) for n in output.args[0][1:]]
    wanted = [isinstance(n.meta.get("val"), Tensor) for n in inputs]
    at = {kind: iter([i for i, own in enumerate(found) if own == kind]) for kind in (True, False)}
    return tuple(next(at[kind]) for kind in wanted)


def _same_layout(a: Any, b: Any) -> bool:
    """Whether two tensors lie in memory alike; not known of sparse ones."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.layout != torch.strided or b.layout != torch.strided:
        return False
    facts = [(t.shape, t.stride(), t.storage_offset(), t.dtype, t.device) for t in (a, b)]
    return facts[0] == facts[1]


def distinct(inputs: Sequence[Any]) -> list[Any]:
    """One object for each input: a tensor given twice would become one placeholder for two."""
    return [i.detach() if isinstance(i, Tensor) else i for i in inputs]


def _fake_mode(graph: fx.GraphModule) -> FakeTensorMode:
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise RuntimeError("expected at least one fake tensor in a traced body")


def _writes(graph: fx.GraphModule) -> bool:
    """Whether an operation of an ATen graph changes a tensor in place."""
    targets = (node.target for node in graph.graph.nodes if node.op == "call_function")
    return any(isinstance(target, OpOverload) and schema_of(target).is_mutable for target in targets)


def _name_placeholders(graph: fx.GraphModule, primals: int) -> None:
    """The partitioner tells inputs from cotangents by their names."""
    for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder"):
        name = f"primals_{i + 1}" if i < primals else f"tangents_{i - primals + 1}"
        node.target = name
        rename_node(node, name)
    graph.recompile()


def _outputs_only(backward: fx.GraphModule, keep: list[int]) -> fx.GraphModule:
    """The backward graph restricted to some outputs."""
    graph = copy.deepcopy(backward)
    (output,) = [n for n in graph.graph.nodes if n.op == "output"]
    output.args = (tuple(output.args[0][i] for i in keep),)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.convolution_backward.default:
            # dead-code elimination does not look inside: it would go on computing weight gradients nobody reads
            read = {user.args[1] for user in node.users}
            mask = [bool(wanted) and i in read for i, wanted in enumerate(node.args[-1])]
            node.args = (*node.args[:-1], mask)
    graph.recompile()
    return graph


def _without_views(graph: fx.GraphModule) -> fx.GraphModule:
    """The same where saved tensors may have other strides than in the trace: shapes are changed by copies where need be."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph
