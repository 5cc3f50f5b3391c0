"""The `torch.compile` backend: options, passes, regions, and the inner backend for everything else."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .caches import reset
from .capture import OFF, install, marker
from .capture.install import EVERYTHING
from .capture.marker import is_marker
from .config import Config, OptionError, Options
from .kernels.folder import distrusted
from .passes.ambient import ambient_at
from .passes.base import ExitTest, Loop, PassContext, describe, is_tensor, marked, value_of
from .passes.exits import drop_assertions, drop_consumed
from .passes.extract import body_hash, dim_order, target_name
from .passes.find_loops import deduplicate_constants
from .passes.inline import checkpoint_body
from .passes.inputs import reads_inputs, trained_alone
from .passes.pipeline import ROUNDS, Work
from .passes.replace import Replace
from .passes.unroll_while import SITE
from .region.body import BodySpec
from .region.layout import CHANNELS_LAST
from .region.modes import Ambient
from .region.op import solve_op
from .region.site import RegionSpec, Site, own, register
from .region.stop import GraphTest, NormTest, StopTest
from .report import Region, Report
from .scope import scoped_options
from .torch_parts import FakeTensorMode, trace_structured
from .unexpected import survive

log = logging.getLogger("deq_compile.backend")

OWN_CAP = 10**6  # iterations of a loop of the user's own that its test alone ends: as good as without end
CompiledFn = Callable[..., Any]


class Backend:
    """The "deq" backend with its options bound; what `@deq_compile` and `explain` hand to `torch.compile`.

    report: collects what is found in every graph; None for a report of each graph's own (logged, then dropped).
    votes: whether what its regions find counts for the other ranks of a distributed run.
    """

    __name__ = "deq"
    takes_whole_graphs = True  # DDP must not split a graph before it arrives (capture/ddp.py)

    def __init__(
        self, options: Mapping[str, Any] | Options | None = None, report: Report | None = None, *, votes: bool = True
    ) -> None:
        self.options = Options.from_options(options)
        self.report, self.votes = report, votes

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> CompiledFn:
        outer = self.options.merge(Options.from_options(options))
        report = self.report if self.report is not None else Report()
        try:
            sites = rewrite_if_possible(gm, outer, report)
        finally:
            self.tell(report)
        for site in sites:
            site.votes = self.votes
        return own(compile_rest(gm, example_inputs, outer.resolve(), mode), sites)

    def reset(self) -> None:
        """What `torch._dynamo.reset()` calls of every backend that it has seen."""
        reset()

    def tell(self, report: Report) -> None:
        """Add what capture refused while it traced for this backend."""
        report.skipped += [skipped for skipped in marker.refusals(self) if skipped not in report.skipped]


_default = Backend()


def deq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledFn:
    """`torch.compile(model, backend="deq", options={...})`; the options are those of `deq_compile.config.Options`.

    `mode` is translated for Inductor. An unknown option or a bad value is a ValueError (inside torch's
    BackendCompilerFailed) that names it, the known ones and the nearest match.
    """
    return _default(gm, example_inputs, mode=mode, options=options)


deq.takes_whole_graphs = True  # type: ignore[attr-defined]
deq.reset = reset  # type: ignore[attr-defined]


def rewrite_if_possible(gm: fx.GraphModule, options: Options, report: Report) -> list[Site]:
    """As `rewrite`; where a pass fails, for whatever cause, the graph is as it was, and the report says so.

    Raises:
        OptionError: options of the user's, in the graph, that are none.
        Retrace: as `rewrite`; or the graph holds markers, which only passes understand.
    """
    if EVERYTHING in OFF:
        return []
    bodies = [(module, module.graph) for module in gm.modules() if isinstance(module, fx.GraphModule)]
    try:
        return rewrite(gm, options, report)
    except (OptionError, marker.Retrace):
        raise
    except Exception as error:
        report.skipped.append(survive(error, "rewriting a graph"))
        for module, graph in bodies:
            if module.graph is not graph:
                module.graph = graph
                module.recompile()
        sites = [marked(node) for node in gm.graph.nodes if is_marker(node.target)]
        if sites:
            marker.retrace(sites)
        return []


def rewrite(gm: fx.GraphModule, options: Options, report: Report) -> list[Site]:
    """Replace the fixed-point regions of a Dynamo graph in place; the graph is left untouched where there are none. Returns the
    sites, which the graph owns; what is compiled of it has to own them too.

    Raises:
        Retrace: capture marked a region that no pass could take; Dynamo traces the frame again without it.
    """
    report.graphs += 1
    rows: list[tuple[Region, Site]] = []
    left: list[str] = []
    _rewrite(gm, Ambient.now(), options, report, rows, left)
    if left:
        marker.retrace(left)
    report.regions += [row for row, _ in rows]
    sites = [site for _, site in rows]
    if rows:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "deq_rewritten_graph", "encoding": "string"},
            payload_fn=lambda: gm.print_readable(print_output=False),
        )
    own(gm, sites)
    return sites


def _rewrite(
    gm: fx.GraphModule, start: Ambient, options: Options, report: Report, rows: list[tuple[Region, Site]], left: list[str]
) -> None:
    """One graph, and the bodies of its checkpoints. `left` collects the sites of markers that nothing consumed."""
    skip: set[str] = set()
    while True:
        graph, found, unconsumed = _attempt(gm, start, options, report, skip)
        loops = {site for site in unconsumed if site.startswith(SITE)}
        if not loops:
            break
        skip |= loops  # operators that were written out for nothing
    rows += found
    left += unconsumed
    if found:
        gm.graph = graph
        gm.recompile()
    for node in gm.graph.nodes:
        body = checkpoint_body(gm, node)
        if body is not None:
            _rewrite(body, ambient_at(gm.graph, node, start), options, report, rows, left)


def _attempt(
    gm: fx.GraphModule, start: Ambient, options: Options, report: Report, skip: set[str]
) -> tuple[fx.Graph, list[tuple[Region, Site]], list[str]]:
    """A rewritten copy of a graph, the regions in it, and the sites of markers that nothing consumed."""
    graph = _copy_of(gm.graph)
    deduplicate_constants(graph)
    drop_assertions(graph)

    def min_repeats(nodes: Sequence[fx.Node]) -> int:
        return scoped_options(nodes, options).resolve().min_repeats

    def keep_hooks(nodes: Sequence[fx.Node]) -> bool:
        return scoped_options(nodes, options).resolve().hooks == "keep"

    context = PassContext(min_repeats, keep_hooks, report)
    work = Work(gm, start, skip)
    rows: list[tuple[Region, Site]] = []
    consumed: set[tuple[Any, ...]] = set()
    for steps in ROUNDS:
        context.loops = []
        for step in steps:
            step.make(work)(graph, context)
        consumed = consumed.union(*(loop.passages for loop in context.loops))
        modes = {id(loop): ambient_at(graph, loop.first, start) for loop in context.loops}
        Replace(lambda loop: _call(loop, modes[id(loop)], options, rows))(graph, context)  # noqa: B023 (called at once)
    drop_consumed(graph, consumed)
    return graph, rows, [marked(node) for node in graph.nodes if is_marker(node.target)]


def _copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy that AOTAutograd accepts: it asks inputs where they come from, which no copy of a node carries over."""
    new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        if hasattr(old_node, "_dynamo_source"):
            new_node._dynamo_source = old_node._dynamo_source
    return new


def _call(
    loop: Loop, ambient: Ambient, options: Options, rows: list[tuple[Region, Site]]
) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """Register the region of a loop; the node that stands in for it."""
    chosen = scoped_options(loop.segment(0), options).merge(Options.from_options(loop.options))
    whole_batch = loop.hints.pop("whole_batch_tol", None)
    config = usable(chosen.resolve(**loop.hints), [value_of(n) for n in loop.outputs])
    tests: list[StopTest] = [_stop_test(test) for test in loop.tests]
    tests += [NormTest(whole_batch, relative=False)] if whole_batch is not None else []
    spec = region_spec(loop, ambient, config, tuple(tests))
    site = register(spec, _place(loop, spec, sum(known.location == loop.location for known, _ in rows)))
    states = tuple((tuple(str(s) for s in value_of(n).shape), str(value_of(n).dtype)[6:]) for n in loop.outputs)
    row = Region(
        key=site.key,
        kind=loop.kind,
        location=loop.location,
        states=states,
        iterations=spec.iterations,
        operands=len(loop.operands),
        hoisted=tuple(describe(n) for n in loop.kept_nodes),
        solver=config.solver,
        backward=config.backward if spec.grad else "-",
        status=site.verdict,
        notes=(*loop.notes, *_notes(spec)),
    )
    rows.append((row, site))
    count = f"{spec.iterations} iterations" if spec.iterations is not None else "until its tolerance"
    log.info("region %s at %s: %s, %s, %d operands", site.key, spec.where, loop.kind, count, len(loop.operands))

    def changed(site: Site) -> None:
        row.status, row.distance = site.verdict, site.distance
        row.reuse, row.gradient_error = site.reuses, site.gradient_error
        row.engine, row.engine_reason = site.engine, site.engine_reason

    site.on_change = changed
    return solve_op, (list(loop.initial), list(loop.operands), list(loop.sizes), site.key)


def _notes(spec: RegionSpec) -> list[str]:
    """What has been decided about a region before its first call."""
    if spec.only_start_differs:
        return ["kept, since its initial state alone needs a gradient, and a fixed point has none to give it"]
    if spec.suspect and spec.start_decides:
        return ["kept, since it may have several fixed points, and its initial state, which says which one, needs a gradient"]
    if spec.suspect and spec.own_loop_cap is not None:
        return ["the input reaches it through its initial state alone, so it may have several fixed points: no solve is tried"]
    return []


def _place(loop: Loop, spec: RegionSpec, before: int) -> str:
    """A loop's name among the ranks: the line, the operations, and how many loops of that line came before in the graph. No
    sizes, devices or addresses, which differ among ranks that compile the same model."""
    assert loop.body is not None
    where, line = os.path.basename(loop.location.file), loop.location.line
    operations = [
        fx.node._get_qualified_name(node.target) if callable(node.target) else str(node.target)
        for node in loop.body.graph.nodes
        if node.op in ("call_function", "call_method") and is_tensor(node)
    ]
    facts = where, line, before, operations, spec.dtypes, spec.iterations, spec.config.key()
    return f"{where}:{line}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def region_spec(loop: Loop, ambient: Ambient, config: Config, stop: tuple[StopTest, ...] = ()) -> RegionSpec:
    assert loop.body is not None
    outputs = [value_of(n) for n in loop.outputs]
    tensors = [value_of(n) for n in (*loop.initial, *loop.operands) if is_tensor(n)]
    needs = tuple(bool(value_of(n).requires_grad) for n in loop.operands)
    body = BodySpec(
        call=loop.body.forward,
        hash=body_hash(loop.body),
        ambient=ambient,
        inner=config.inner,
        inductor=tuple(sorted(config.inductor.items())),
    )
    return RegionSpec(
        body=body,
        dtypes=tuple(v.dtype for v in outputs),
        orders=tuple(_order(v, value_of(n), loop.body) for v, n in zip(outputs, loop.initial, strict=True)),
        iterations=None if loop.declared else loop.count,
        grad=ambient.grad and any(t.requires_grad for t in tensors),
        config=config,
        where=str(loop.location),
        stop=() if config.provenance["tol"] == "option" else stop,  # an explicit tolerance beats what the user's code says
        own_tests=stop,
        own_cap=int(loop.hints.get("max_iter", OWN_CAP)) if loop.tests and loop.count > 1 else None,
        needs=needs,
        solver_call=loop.declared and loop.count == 1 and loop.form != "fixed_point" and config.semantics == "loop",
        start_grad=any(value_of(n).requires_grad for n in loop.initial if is_tensor(n)),
        start_trained=trained_alone(loop.initial, loop.operands),
        suspect=not reads_inputs(loop.operands) and reads_inputs(loop.initial),
        channels_last=all(v.device.type == "cpu" for v in outputs) and _turns_images(loop.body, config),
    )


def _turns_images(body: fx.GraphModule, config: Config) -> bool:
    """Whether Inductor would bring the images of a body into channels-last order, on a CPU."""
    from torch._inductor import config as inductor

    if config.inner != "inductor" or not torch.backends.mkldnn.is_available():
        return False
    names = (target_name(n.target) for n in body.graph.nodes if n.op == "call_function")
    wanted = config.inductor.get("layout_optimization", inductor.layout_optimization)
    return bool(wanted) and any("conv2d" in name or "conv_transpose2d" in name for name in names)


def _order(value: torch.Tensor, start: Any, body: fx.GraphModule) -> tuple[int, ...]:
    """The memory order of a state. Where the fake tensors of this torch are wrong about group_norm, that of the initial state."""
    if value.dim() == 4 and value.device.type == "cpu" and isinstance(start, torch.Tensor) and start.dim() == 4:
        wrong = dim_order(value) != CHANNELS_LAST == dim_order(start) and not _fake_group_norm_is_right()
        if wrong and any("group_norm" in target_name(n.target) for n in body.graph.nodes if n.op == "call_function"):
            return CHANNELS_LAST
    return dim_order(value)


@functools.cache
def _fake_group_norm_is_right() -> bool:
    """Whether fake tensors know that group_norm keeps channels-last images so on a CPU. Those of torch 2.14 do not."""
    image = torch.empty(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    mode = FakeTensorMode()
    with torch.no_grad(), mode:
        fake = torch.nn.functional.group_norm(mode.from_tensor(image), 2)
    return bool(fake.stride() == torch.nn.functional.group_norm(image, 2).stride())


def _stop_test(test: ExitTest) -> GraphTest:
    return GraphTest(test.graph.forward, body_hash(test.graph), test.when, test.positions)


def usable(config: Config, values: Sequence[Any]) -> Config:
    """The configuration with an inner backend that this machine can run."""
    on_cpu = any(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in values)
    if config.inner == "inductor" and on_cpu and not has_cpp_compiler():
        return config.replace(inner="aot_eager")
    return config


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler; says so once where it does not."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        warnings.warn(
            "no C++ compiler was found, so Inductor cannot compile for the CPU: the 'deq' backend goes on with "
            "inner='aot_eager'. Fix: install g++ or clang++, or set CXX",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def say_whose_cache() -> None:
    """Inductor runs the code that it finds in its cache, whoever put it there: said once where that may be somebody else."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if reason := distrusted(Path(cache_dir())):
        log.warning("Inductor runs what it finds in its cache, and %s. Fix: set TORCHINDUCTOR_CACHE_DIR", reason)


def compile_rest(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, mode: str | None) -> CompiledFn:
    """Hand a graph to the inner backend."""
    inputs = list(example_inputs)
    inner = usable(config, inputs).inner
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, inputs)
    import torch._inductor
    from torch._inductor.compile_fx import compile_fx

    say_whose_cache()
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **config.inductor}
    compiled: CompiledFn = compile_fx(gm, inputs, config_patches=patches or None)  # type: ignore[assignment]
    return compiled


def _register_backend() -> None:
    """Make `backend="deq"` known from a plain checkout; an installed package is found through its entry point."""
    from torch._dynamo.backends import registry

    if "deq" not in entry_points(group="torch_dynamo_backends").names and "deq" not in registry._COMPILER_FNS:
        registry.register_backend(deq, name="deq")


_register_backend()
install()  # capture: whoever looks this backend up is about to trace for it
