"""From a loop that the passes found to the node that stands in for it: options, the region's facts, its place."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .capture import sites
from .config import Config, Options
from .inner import usable
from .passes.base import ExitTest, Loop, describe, hint, is_tensor, value_of
from .passes.extract import body_hash, dim_order, target_name
from .passes.inputs import reads_inputs, trained_alone
from .passes.work import work_of
from .region.body import BodySpec
from .region.layout import CHANNELS_LAST
from .region.modes import Ambient
from .region.op import solve_op
from .region.site import RegionSpec, Site, register
from .region.stop import GraphTest, NormTest, StopTest
from .region.worth import WayOut, small
from .report import Reason, Region, Skipped, Standing
from .scope import scoped_options
from .torch_parts import FakeTensorMode, qualified_name

log = logging.getLogger("deq_compile.lower")

# Operations beyond which the iterations of a loop are not compiled one by one: that takes Inductor up to 80 ms each.
MOST_NODES = 1500
OWN_CAP = 10**6  # iterations of a loop of the user's own that its test alone ends: as good as without end


def lowered(
    loop: Loop, ambient: Ambient, options: Options, rows: list[tuple[Region, Site]]
) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """Register the region of a loop; the node that stands in for it."""
    spec = _spec_of(loop, ambient, options)
    site = register(spec, _place(loop, spec, sum(known.location == loop.location for known, _ in rows)))
    site.way_out = _way_out(loop, spec)
    rows.append((_row(loop, spec, site.key, site.standing), site))
    count = f"{spec.iterations} iterations" if spec.iterations is not None else "until its tolerance"
    log.info("region %s at %s: %s, %s, %d operands", site.key, spec.where, loop.kind, count, len(loop.operands))
    sizes = [*loop.sizes] if loop.counter is None else [*loop.sizes, loop.counter]
    return solve_op, (list(loop.initial), list(loop.operands), sizes, site.key)


def _way_out(loop: Loop, spec: RegionSpec) -> WayOut:
    """With `leave` for a loop that capture has followed, where its own iterations may stand in for it."""
    assert loop.body is not None
    out = WayOut(work_of(loop.body, loop.tests))
    if loop.passages and spec.own_tests and spec.own_loop_cap is not None and spec.config.verify == "periodic":
        places = [str(site) for site, _ in loop.passages]
        out.leave = sites.way_out(places, Skipped(Reason.TOO_CHEAP, loop.location))
        if out.leave is not None:
            out.settle, out.settled = sites.settling(places)
    return out


def stays(loop: Loop, ambient: Ambient, options: Options) -> Region | None:
    """The report's row of a loop that is kept whatever its calls may show, and so may stay in the graph, for Inductor to see its
    iterations; None of any other, and of one whose body is so large that this would only take longer to compile."""
    if loop.declared or loop.passages or loop.count * loop.period > MOST_NODES:
        return None
    spec = _spec_of(loop, ambient, options)
    if not (spec.keeps and spec.written_out) or not small(_way_out(loop, spec).work, spec.grad):
        return None
    return _row(loop, spec, "", Standing("kept"))


def _spec_of(loop: Loop, ambient: Ambient, options: Options) -> RegionSpec:
    chosen = scoped_options(loop.segment(0), options).merge(Options.from_options(loop.options))
    hints = dict(loop.hints)
    own_norm, attached = _own_norm(hints), bool(hints.pop("attached", False))
    config = usable(chosen.resolve(**hints), [value_of(n) for n in loop.outputs])
    tests: list[StopTest] = [*(_stop_test(test) for test in loop.tests), *own_norm]
    return region_spec(loop, ambient, config, tuple(tests), attached)


def _row(loop: Loop, spec: RegionSpec, key: str, standing: Standing) -> Region:
    states = tuple((tuple(str(s) for s in value_of(n).shape), str(value_of(n).dtype)[6:]) for n in loop.outputs)
    return Region(
        key=key,
        kind=loop.kind,
        location=loop.location,
        states=states,
        iterations=spec.iterations if spec.outside is None else None,
        operands=len(loop.operands),
        hoisted=tuple(describe(n) for n in loop.kept_nodes),
        solver=spec.config.solver,
        backward=spec.config.backward if spec.grad else "-",
        notes=(*loop.notes, *dict.fromkeys(str(node.args[2]) for node in loop.told), *_notes(spec)),
        standing=standing,
    )


def _own_norm(hints: dict[str, Any]) -> list[NormTest]:
    """The test of a solver that looks at the whole batch; takes the hint of it."""
    said = [(hints.pop("whole_batch_tol", None), False), (hints.pop("whole_batch_relative_tol", None), True)]
    return [NormTest(tol, relative) for tol, relative in said if tol is not None]


def _notes(spec: RegionSpec) -> list[str]:
    """What has been decided about a region before its first call."""
    if spec.only_start_differs:
        return ["kept, since its initial state alone needs a gradient, and a fixed point has none to give it"]
    if spec.suspect and spec.start_decides:
        return ["kept, since it may have several fixed points, and its initial state, which says which one, needs a gradient"]
    if spec.suspect and spec.keeps:
        return [
            "kept, since it may have several fixed points, and backward='reversible' may lead to another one than its own steps"
        ]
    if spec.suspect and spec.own_loop_cap is not None:
        return ["the input reaches it through its initial state alone, so it may have several fixed points: no solve is tried"]
    return []


def _place(loop: Loop, spec: RegionSpec, before: int) -> str:
    """A loop's name among the ranks: the line, the operations, and how many loops of that line came before in the graph. No
    sizes, devices or addresses, which differ among ranks that compile the same model."""
    assert loop.body is not None
    where, line = os.path.basename(loop.location.file), loop.location.line
    operations = [
        qualified_name(node.target) if callable(node.target) else str(node.target)
        for node in loop.body.graph.nodes
        if node.op in ("call_function", "call_method") and is_tensor(node)
    ]
    count = spec.iterations if spec.outside is None else "n"
    facts = where, line, before, operations, spec.dtypes, count, spec.config.key()
    return f"{where}:{line}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def region_spec(
    loop: Loop, ambient: Ambient, config: Config, stop: tuple[StopTest, ...] = (), attached: bool = False
) -> RegionSpec:
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
        symbols=_symbols(loop),
    )
    return RegionSpec(
        body=body,
        dtypes=tuple(v.dtype for v in outputs),
        orders=tuple(_order(v, value_of(n), loop.body) for v, n in zip(outputs, loop.initial, strict=True)),
        iterations=None if loop.declared else loop.count if loop.counter is None else hint(value_of(loop.counter)) - loop.outside,
        outside=None if loop.counter is None else loop.outside,
        grad=ambient.grad and any(t.requires_grad for t in tensors),
        config=config,
        where=str(loop.location),
        stop=() if config.provenance["tol"] == "option" else stop,  # an explicit tolerance beats what the user's code says
        own_tests=stop,
        own_cap=int(loop.hints.get("max_iter", OWN_CAP)) if loop.tests and loop.count > 1 else None,
        needs=needs,
        attached=attached,
        solver_call=loop.declared and loop.count == 1 and loop.form != "fixed_point" and config.semantics == "loop",
        start_grad=any(value_of(n).requires_grad for n in loop.initial if is_tensor(n)),
        start_trained=trained_alone(loop.initial, loop.operands),
        suspect=not reads_inputs(loop.operands) and reads_inputs(loop.initial),
        channels_last=all(v.device.type == "cpu" for v in outputs) and _turns_images(loop.body, config),
    )


def _symbols(loop: Loop) -> tuple[Any, ...]:
    """`BodySpec.symbols` of a loop."""
    sizes = [n for state in loop.outputs for n in value_of(state).shape]
    sizes += [value_of(n) for n in loop.sizes]
    sizes += [n for operand in loop.operands for n in value_of(operand).shape]
    found = tuple(size.node.expr if isinstance(size, torch.SymInt) else None for size in sizes)
    return found if any(expr is not None for expr in found) else ()


def _turns_images(body: fx.GraphModule, config: Config) -> bool:
    """Whether Inductor would bring the images of a body into channels-last order, on a CPU."""
    from .torch_parts import inductor_config as inductor

    if inductor is None or config.inner != "inductor" or not torch.backends.mkldnn.is_available():
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
