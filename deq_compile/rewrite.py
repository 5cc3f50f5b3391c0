"""What becomes of a graph of Dynamo's: passes find the fixed-point regions in it, and one node stands in for each."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .capture import OFF, bars, dynamo, said, sharded, sites, sparse
from .capture.install import EVERYTHING
from .config import OptionError, Options
from .families.functions import forward_at_work
from .lower import lowered, stays
from .markers import is_marker
from .passes.ambient import ambient_at
from .passes.base import Loop, PassContext, marked
from .passes.declared import drop_untold
from .passes.exits import drop_assertions, drop_consumed
from .passes.find_loops import deduplicate_constants
from .passes.inline import checkpoint_body
from .passes.pipeline import ROUNDS, Work
from .passes.replace import Replace
from .passes.unroll_while import SITE
from .region.modes import Ambient
from .region.site import Site, own
from .report import Region, Report
from .scope import scoped_options
from .torch_parts import copy_source, trace_structured
from .unexpected import survive


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
    except (OptionError, sites.Retrace):
        raise
    except Exception as error:
        report.skipped.append(survive(error, "rewriting a graph"))
        for module, graph in bodies:
            if module.graph is not graph:
                module.graph = graph
                module.recompile()
        left = _markers_in(gm)
        if left:
            sites.retrace(left)
        return []


def rewrite(gm: fx.GraphModule, options: Options, report: Report) -> list[Site]:
    """Replace the fixed-point regions of a Dynamo graph in place; the graph is left untouched where there are none. Returns the
    sites, which the graph owns; what is compiled of it has to own them too.

    Raises:
        Retrace: capture marked a region that no pass could take; Dynamo traces the frame again without it.
    """
    report.graphs += 1
    whole = _Found()
    _rewrite(gm, Ambient.now(), options, report, whole)
    found = len(whole.rows) + len(whole.stays)
    left = [*whole.left, *_markers_in(gm), *said.unheard(), *bars.unshown(), *sparse.unused(found), *sharded.unused(found)]
    if left:
        sites.retrace(left)
    report.regions += [*(row for row, _ in whole.rows), *whole.stays]
    made = [site for _, site in whole.rows]
    if made:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "deq_rewritten_graph", "encoding": "string"},
            payload_fn=lambda: gm.print_readable(print_output=False),
        )
    own(gm, made)
    return made


def _markers_in(gm: fx.GraphModule) -> list[str]:
    """The sites of markers in a graph, and in those that operators such as `torch.cond` are given: no pass takes any there."""
    found = [marked(node) for node in gm.graph.nodes if is_marker(node.target)]
    for node in gm.graph.nodes:
        below = getattr(gm, str(node.target), None) if node.op == "get_attr" and node.users else None
        if isinstance(below, fx.GraphModule):
            found += _markers_in(below)
    return found


@dataclasses.dataclass
class _Found:
    """What is found in a graph: the regions, the loops that stay in it, and the sites of markers that nothing consumed."""

    rows: list[tuple[Region, Site]] = dataclasses.field(default_factory=list)
    stays: list[Region] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)


def _rewrite(gm: fx.GraphModule, start: Ambient, options: Options, report: Report, whole: _Found) -> None:
    """One graph, and the bodies of its checkpoints; `whole` collects what is found."""
    skip: set[str] = set()
    while True:
        graph, found = _attempt(gm, start, options, report, skip)
        loops = {site for site in found.left if site.startswith(SITE)}
        if not loops:
            break
        skip |= loops  # operators that were written out for nothing
    whole.rows += found.rows
    whole.stays += found.stays
    whole.left += found.left
    if found.rows:
        gm.graph = graph
        gm.recompile()
    for node in gm.graph.nodes:
        body = checkpoint_body(gm, node)
        if body is not None:
            _rewrite(body, ambient_at(gm.graph, node, start), options, report, whole)


def _attempt(gm: fx.GraphModule, start: Ambient, options: Options, report: Report, skip: set[str]) -> tuple[fx.Graph, _Found]:
    """A rewritten copy of a graph, and what was found in it."""
    graph = _copy_of(gm.graph)
    deduplicate_constants(graph)
    drop_assertions(graph)

    def min_repeats(nodes: Sequence[fx.Node]) -> int:
        return scoped_options(nodes, options).resolve().min_repeats

    def keep_hooks(nodes: Sequence[fx.Node]) -> bool:
        return scoped_options(nodes, options).resolve().hooks == "keep"

    context = PassContext(min_repeats, keep_hooks, report, function=forward_at_work(getattr(dynamo.current(), "f_code", None)))
    work = Work(gm, start, skip)
    found = _Found()
    consumed: set[tuple[Any, ...]] = set()
    for steps in ROUNDS:
        context.loops = []
        for step in steps:
            step.make(work)(graph, context)
        consumed = consumed.union(*(loop.passages for loop in context.loops))
        modes = {id(loop): ambient_at(graph, loop.first, start) for loop in context.loops}
        staying = {id(loop): stays(loop, modes[id(loop)], options) for loop in context.loops}
        context.loops = [loop for loop in context.loops if staying[id(loop)] is None]
        found.stays += [row for row in staying.values() if row is not None]

        def lower(loop: Loop) -> tuple[Callable[..., object], tuple[Any, ...]]:
            node = lowered(loop, modes[id(loop)], options, found.rows)  # noqa: B023 (called at once)
            bars.solved(found.rows[-1][0], loop.segment(0))
            return node

        Replace(lower)(graph, context)
    drop_consumed(graph, consumed)
    drop_untold(graph, context)
    found.left = [marked(node) for node in graph.nodes if is_marker(node.target)]
    return graph, found


def _copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy that AOTAutograd accepts: it asks inputs where they come from, which no copy of a node carries over."""
    new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        copy_source(old_node, new_node)
    return new
