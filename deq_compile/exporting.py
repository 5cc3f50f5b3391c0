"""`torch.export` and `torch.jit.trace` of a compiled or decorated model: its regions become loops of the exported program.

`torch.export` leaves out what `torch.compile` has made of a model and traces the user's own code, which unrolls a loop of a
fixed count and refuses one that a test ends. Here such a call is traced by Dynamo for a backend of ours first, as torch does for
its own control flow, and the rewritten graph is what the export sees, with `torch.while_loop` in the place of each region.

A trace of TorchScript holds no such loop: `torch.jit.trace` gets the user's own iterations where their number is fixed, and is
refused where it depends on data.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import torch_parts
from .capture import dynamo
from .capture.ddp import takes_whole_graphs
from .config import Options
from .inner import CompiledFn
from .onlooker import original_of
from .region.in_graph import Carried, run_in_graph
from .region.modes import Ambient
from .region.op import solve_op
from .region.probe import rows_are_independent
from .region.site import Site
from .region.site import site as find_site
from .region.surroundings import NotHere
from .report import Report
from .rewrite import rewrite_if_possible
from .torch_parts import call_of, is_jit_tracing

Call = Callable[..., Any]


def exporting() -> bool:
    """Whether `torch.export` traces the calling code, and no Dynamo in between."""
    if torch.compiler.is_dynamo_compiling():  # who traces this call: torch 2.11 takes each of its traces for an export
        return False
    return torch.compiler.is_exporting() and dynamo.current() is None and _can_export()


@functools.cache
def _can_export() -> bool:
    """Whether this torch has the parts for it; else it goes on with the user's own code."""
    parts = torch_parts.while_loop, torch_parts.compiling_inside, torch_parts.without_modes
    return not any(isinstance(part, torch_parts.Absent) for part in parts)


def exportable(compiled: Call, call: Call, options: Options, owner: nn.Module | None = None) -> Call:
    """`compiled`, but for an export `call`, what it was made of, with its regions as loops; `owner` is the module it is of."""

    @functools.wraps(compiled)
    def either(*args: Any, **kwargs: Any) -> Any:
        if exporting():
            return traced(call, options, owner)(*args, **kwargs)
        if is_jit_tracing():
            return _own_iterations(call, *args, **kwargs)
        return compiled(*args, **kwargs)

    return either


def _own_iterations(call: Call, *args: Any, **kwargs: Any) -> Any:
    """`call` as the user wrote it, for `torch.jit.trace`.

    Raises:
        NotHere: a branch on data, in which a trace would hold the choice of its one example.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = call(*args, **kwargs)
    for warning in told:
        if "Python boolean might cause the trace to be incorrect" in str(warning.message):
            raise NotHere(
                "torch.jit.trace of a compiled model: expected iterations of a fixed number, got a branch on data at "
                f"{warning.filename}:{warning.lineno}, of which the trace would hold that of one example. Fix: "
                "torch.export.export, which makes a loop of it"
            )
    for warning in told:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return found


def traced(call: Call, options: Options, owner: nn.Module | None = None) -> Call:
    """`call` for an export: its arguments are fake tensors that are being traced, and so is what is done with them.

    Raises:
        NotHere: a region of a model in training mode, where gradients are recorded.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch_parts.compiling_inside() as eager:
            backend = _Exporter(options, eager, owner is not None and owner.training)
            return torch.compile(_of_its_own(call), backend=backend)(*args, **kwargs)

    return run


def _of_its_own(call: Call) -> Call:
    """A function that calls `call`, with a code object that no other has: what Dynamo remembers of it goes with it."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return types.FunctionType(alone.__code__.replace(), alone.__globals__, "alone", None, alone.__closure__)


class _Exporter:
    """The backend of Dynamo's trace within an export. `eager` is torch's own for its control flow: it runs a graph under the
    modes of the export."""

    __name__ = "deq"
    takes_whole_graphs = True

    def __init__(self, options: Options, eager: Call, training: bool) -> None:
        self.options, self.eager, self.training = options, eager, training

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> CompiledFn:
        made = rewrite_if_possible(gm, self.options, Report())
        trained = next((site for site in made if site.spec.grad and self.training), None)
        for node in _solves(gm):
            with torch_parts.without_modes():
                _decide_rows(node)
            node.target = _solve_in_export
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                _enter_autocast_itself(module.graph)
                module.recompile()

        def forward(*args: Any) -> Any:
            if trained is not None:
                raise NotHere(
                    f"torch.export of a fixed-point region at {trained.spec.where}: expected a model for inference, since an "
                    "exported region has no gradient, got one in training mode. "
                    "Fix: model.eval(), or export under torch.no_grad()"
                )
            before = Ambient.now()
            try:
                return gm.forward(*args)
            except Exception:
                for device, enabled, _ in before.autocast:
                    torch.set_autocast_enabled(device, enabled)
                raise

        compiled: CompiledFn = self.eager(_Graph(forward, made), example_inputs)
        return compiled


class _Graph:
    """A graph with the sites of its regions, which live as long."""

    def __init__(self, forward: Call, sites: Sequence[Site]) -> None:
        self.forward, self.sites = forward, tuple(sites)


def _enter_autocast_itself(graph: fx.Graph) -> None:
    """Within an export Dynamo's calls are only written down; those of the context itself are obeyed too."""
    twins = {torch_parts.enter_autocast: _enter, torch_parts.exit_autocast: _exit}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in twins:
            node.target = twins[node.target]


def _enter(device: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None) -> torch.autocast:
    context = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
    context.__enter__()
    return context


def _exit(context: torch.autocast) -> None:
    context.__exit__(None, None, None)


def _solves(gm: fx.GraphModule) -> list[fx.Node]:
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return [node for graph in graphs for node in graph.nodes if node.target is solve_op]


# ---- the region


def _solve_in_export(state0: list[Tensor], operands: list[Tensor], sizes: list[Any], region: str) -> list[Tensor]:
    """`deq::solve` while an export traces."""
    site = find_site(region)
    alone = [tensor.detach() for tensor in (*state0, *operands)]
    states, rest = alone[: len(state0)], alone[len(state0) :]
    found = run_in_graph(site.spec, site.rows is True, _while, states, rest, sizes)
    wall = _no_gradient([*state0, *operands])
    return [t + wall.to(t.dtype) for t in found[: len(state0)]] + found[len(state0) :]


def _while(condition: Call, turn: Call, carried: Carried, others: Carried) -> Carried:
    return tuple(torch_parts.while_loop(condition, turn, carried, others))


def _no_gradient(sources: Sequence[Tensor]) -> Tensor:
    """Zero, through which no gradient gets to `sources`: an exported program has nothing of this package's that could say so, and
    the gradient of the solver's own steps would be a wrong one. Torch raises, since it has no derivative of this function."""
    nothing = [(t if t.dim() else t[None]).narrow(0, 0, 0).flatten().float() for t in sources if t.is_floating_point()]
    zero: Tensor = torch.special.zeta(torch.cat(nothing), 2.0).sum()
    return zero


def _decide_rows(node: fx.Node) -> None:
    """Whether dimension 0 is a batch of independent samples, tried out on random numbers, since an export has none. An operand of
    integers (the edges of a graph, say) could be anything: there, and where nothing can be tried, the state is one system, which
    is right in every case and takes a few evaluations more."""
    state0, operands, sizes, key = node.args
    site = find_site(str(key))
    states, others, numbers = ([_hinted(_value(n)) for n in part] for part in (state0, operands, sizes))  # type: ignore[union-attr]
    numbers = numbers if site.spec.outside is None else numbers[:-1]
    batched = all(s.dim() for s in states) and len({s.shape[0] for s in states}) == 1
    if site.rows is not None or not batched or states[0].shape[0] < 2:
        site.rows = site.rows is True and batched
        return
    if not all(t.is_floating_point() for t in others):
        site.rows = False
        return
    layout = site.spec.layout([s.shape for s in states], rows=True)

    def body(z: Tensor) -> Tensor:
        return site.spec.body.flat(layout, z, others, numbers)

    with torch.no_grad():
        site.rows = rows_are_independent(body, layout.flatten(states), site.spec.body_eps) is True


def _value(node: Any) -> Any:
    return node.meta["example_value"] if isinstance(node, fx.Node) else node


def _hinted(value: Any) -> Any:
    """A number for a symbol, and a tensor of positive random numbers for a fake one."""
    if isinstance(value, Tensor):
        sizes = [_hinted(size) for size in value.shape]
        return torch.rand(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(value.dtype).to(value.device)
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value


# ---- models that torch.compile has made


def install() -> None:
    """Take the calls of compiled models within an export, for our backend: once, when that is first looked up."""
    with contextlib.suppress(torch_parts.Unavailable):
        cls = dynamo.OptimizedModule
        original = cls.__call__

        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            here = exporting() or is_jit_tracing()
            if here and takes_whole_graphs(getattr(self.dynamo_ctx, "callback", None)):
                model, said = original_of(self)
                module: nn.Module = model  # type: ignore[assignment]
                own = call_of(module)
                return exportable(own, own, Options.from_options(said), module)(*args, **kwargs)
            return original(self, *args, **kwargs)

        cls.__call__ = call
