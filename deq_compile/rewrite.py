"""What becomes of a graph of Dynamo's: passes find the fixed-point regions in it, and one node stands in for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .capture import OFF, bars, said, sites, sparse
from .capture.install import EVERYTHING
from .config import OptionError, Options
from .lower import lowered
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
        left = [marked(node) for node in gm.graph.nodes if is_marker(node.target)]
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
    rows: list[tuple[Region, Site]] = []
    left: list[str] = []
    _rewrite(gm, Ambient.now(), options, report, rows, left)
    left += said.unheard() + bars.unshown() + sparse.unused(len(rows))
    if left:
        sites.retrace(left)
    report.regions += [row for row, _ in rows]
    made = [site for _, site in rows]
    if rows:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "deq_rewritten_graph", "encoding": "string"},
            payload_fn=lambda: gm.print_readable(print_output=False),
        )
    own(gm, made)
    return made


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

        def lower(loop: Loop) -> tuple[Callable[..., object], tuple[Any, ...]]:
            node = lowered(loop, modes[id(loop)], options, rows)  # noqa: B023 (called at once)
            bars.solved(rows[-1][0], loop.segment(0))
            return node

        Replace(lower)(graph, context)
    drop_consumed(graph, consumed)
    drop_untold(graph, context)
    return graph, rows, [marked(node) for node in graph.nodes if is_marker(node.target)]


def _copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy that AOTAutograd accepts: it asks inputs where they come from, which no copy of a node carries over."""
    new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        copy_source(old_node, new_node)
    return new
