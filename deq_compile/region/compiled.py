"""Bodies and their VJPs as ATen graphs, traced once for concrete shapes and called without Dynamo's guards.

One joint graph of the body is split by the min-cut partitioner into `forward(z, operands) -> f, saved` and a backward
from which two graphs are taken: the state's VJP (called many times) and the VJP of state and operands (called once).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

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

from .body import BodySpec, Evaluations, Linearised, Runner
from .layout import Layout
from .modes import autograd_recording, functionalising

Call = Callable[[list[Any]], Sequence[Any]]

if BODIES in lost():  # who imports this goes on without
    raise ImportError(lost()[BODIES])

# The engines capture bodies themselves: an outer mode="reduce-overhead" must not make a graph, or a partition, of each.
# Generated code need not check sizes in every iteration: operands are laid out as in the trace (a runner is found by their shapes
# and strides), saved tensors come from the compiled forward itself, and states and cotangents are made contiguous here.
OWN_PATCHES = {"triton.cudagraphs": False, "graph_partition": False, "size_asserts": False}


class CompiledRunner(Runner):
    def __init__(self, spec: BodySpec, layout: Layout, sizes: Sequence[int], lock: threading.RLock) -> None:
        self.spec, self.layout, self.sizes, self.lock = spec, layout, tuple(sizes), lock
        self.plain: Call | None = None
        self.linear: dict[tuple[bool, ...], tuple[Call, Call, Call]] = {}

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.apply(z, operands)
        z = z.contiguous()
        if self.plain is None:
            self.plain = self._compile_plain(z, operands)
        return self.plain([z, *operands])[0]

    def evaluations(self, operands: Sequence[Tensor], needs: tuple[bool, ...] | None) -> Evaluations:
        return Evaluations(self, operands) if needs is None else LinearisingEvaluations(self, operands, needs)

    def evaluate_and_linearise(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Tensor, Linearised]:
        evaluations = LinearisingEvaluations(self, operands, needs)
        value, linear = evaluations(z), evaluations.linear()
        assert linear is not None
        return value, linear

    def joint(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Call, Call, Call]:
        """forward([z, *operands]) -> (f, *saved); from [*saved, w] the product of the state, and that with operands."""
        found = self.linear.get(needs)
        if found is None:
            found = self.linear[needs] = self._compile_joint(z, operands, needs)
        return found

    def _flat(self, z: Tensor, *operands: Tensor) -> Tensor:
        return self.spec.flat(self.layout, z, operands, self.sizes)

    def _compile_plain(self, z: Tensor, operands: Sequence[Tensor]) -> Call:
        with self.lock:
            return self._finish(self._trace(lambda *a: (self._flat(*a),), _distinct([z, *operands])))

    def _compile_joint(self, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Call, Call, Call]:
        def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
            with autograd_recording():
                wanted = (True, *needs)
                own = [p.detach().requires_grad_(w) for p, w in zip(primals, wanted, strict=True)]
                out = self._flat(*own)
                chosen = [p for p, w in zip(own, wanted, strict=True) if w]
                if not out.requires_grad:
                    grads: Sequence[Tensor | None] = [None] * len(chosen)
                else:
                    grads = torch.autograd.grad(out, chosen, tangents, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)]
            return [out.detach(), *filled]

        inputs = [z, *operands]
        with self.lock:
            graph = self._trace(joint, _distinct(inputs), _distinct([z]))
            _name_placeholders(graph, len(inputs))
            graph.graph.eliminate_dead_code()
            with tracing(TracingContext(_fake_mode(graph))):
                forward, backward = partition(graph, None, num_fwd_outputs=1)
            ready = self._finish(forward)
            # The compiled forward may lay out what it saves differently than the traced one: go on from what it returns.
            saved = list(ready(list(inputs)))[1:]
            count = 1 + sum(needs)
            state = self._finish(self._retrace(_outputs_only(backward, [0]), [*saved, z]))
            full = self._finish(self._retrace(_outputs_only(backward, list(range(count))), [*saved, z]))
        return ready, state, full

    def _trace(self, fn: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
        decompositions = None
        if self.spec.inner == "inductor":
            from deq_compile.torch_parts import select_decomp_table

            decompositions = select_decomp_table() if select_decomp_table is not None else None
        args = inputs if len(inputs) > 1 else tuple(inputs[0])
        graph = make_fx(fn, decomposition_table=decompositions, tracing_mode="fake")(*args)
        if not _writes(graph):
            return graph
        # The partitioner and Inductor expect graphs without writes; a derivative may hold them (that of std does).

        def run(*tensors: Any) -> Any:
            return fx.Interpreter(graph).run(*tensors, enable_io_processing=False)

        with functionalising():
            return make_fx(functionalize(run, remove="mutations"), tracing_mode="fake")(*pytree.tree_leaves(args))

    def _retrace(self, graph: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        return make_fx(graph, tracing_mode="fake")(*_distinct(inputs))

    def _finish(self, graph: fx.GraphModule) -> Call:
        """A function of a list of inputs. Inductor's is called below its wrapper of guards."""
        graph.graph.eliminate_dead_code()
        graph.recompile()
        from deq_compile.torch_parts import compile_fx_inner, inductor_config

        if self.spec.inner != "inductor" or compile_fx_inner is None or inductor_config is None:
            forward = graph.forward  # below the hooks of modules, whose users expect tensors that autograd made
            return lambda inputs: forward(*inputs)
        fake = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        with tracing(TracingContext(_fake_mode(graph))), inductor_config.patch({**dict(self.spec.inductor), **OWN_PATCHES}):
            compiled = compile_fx_inner(graph, fake)
        return getattr(compiled, "current_callable", None) or compiled


class LinearisingEvaluations(Evaluations):
    """Evaluations by the forward that saves what the products need: nothing but the last call's is kept."""

    def __init__(self, runner: CompiledRunner, operands: Sequence[Tensor], needs: tuple[bool, ...]) -> None:
        super().__init__(runner, operands)
        self.joint, self.needs = runner.joint, needs
        self.calls: tuple[Call, Call, Call] | None = None
        self.last: Sequence[Any] = ()

    def __call__(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(z)
        self.count += 1
        z = z.contiguous()
        if self.calls is None:
            self.calls = self.joint(z, self.operands, self.needs)
        self.last = ()  # or two sets of saved tensors would be alive at a time
        self.last = self.calls[0]([z, *self.operands])
        found: Tensor = self.last[0]
        return found

    def linear(self) -> Linearised | None:
        if self.calls is None or not self.last:
            return None
        return CompiledLinearised((self.runner, self.operands), self.last[1:], self.calls[1], self.calls[2])

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


def _distinct(inputs: Sequence[Any]) -> list[Any]:
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
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # saved tensors may have other strides than in the trace
    graph.recompile()
    return graph
