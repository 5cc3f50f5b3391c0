"""Keep Dynamo in a loop whose exit depends on data.

    for _ in range(100):
        z_new = f(z, x)
        done = (z_new - z).norm() < tol
        z = z_new
        if done:              # stock Dynamo breaks the graph here, in every iteration
            break

For our backend the translator passes such a branch by on the side that stays, leaves a `may_exit` in the graph, and after
UNROLLED visits takes the exit. The loop then stands in the graph as a chain of equal segments, which the passes know how
to find; the tests say when its solve is done. Where no pass takes it, Dynamo traces the frame again without all this.

What is assumed is that nothing but tensors depends on the number of iterations. Everything else is refused, with a line:
a Python value that is written in the loop and read after it, attributes and lists that grow, constants that tell one end
of the loop from the other.

`capture.install` switches this on after a self-test only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from deq_compile import markers
from deq_compile.report import Reason, Skipped

from . import breaks, counted, counters, decisions, dynamo, effects, known, observations, said, sites, varying
from .bytecode import Exit, code_of
from .visits import Visits, grows, leaks, live_after, moves, says_how

_JUMPS = (
    "POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE",
    "POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_BACKWARD_IF_TRUE", "POP_JUMP_FORWARD_IF_FALSE", "POP_JUMP_BACKWARD_IF_FALSE",
)  # fmt: skip


def install() -> Callable[[], None]:
    """Patch the translators; returns what takes the patches out again."""
    made: dict[str, Any] = dict.fromkeys(decisions.OPCODES, decisions.handler)
    made |= {name: functools.partial(_handler, jumps_if_true="TRUE" in name) for name in _JUMPS}
    made["COMPARE_OP"] = lambda original: counters.handler(decisions.handler(original))
    undo = [dynamo.patch_instructions(made), dynamo.patch_calls(_call_handler)]
    method_item = dynamo.tensor_method("item")

    @functools.wraps(method_item)
    def item(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not sites.ours(tx):
            return method_item(self, tx, *args, **kwargs)
        with sites.guarded(tx, "reading a number in a loop"):
            number = _constant(tx, tx.current_instruction, self)
            if number is not None:
                return dynamo.build(tx, number.item())
            in_graph = not (tx.one_graph or dynamo.config.capture_scalar_outputs) and _in_loop(tx)
            if not in_graph:
                in_graph = counted.is_to_be_followed(tx)
            if not in_graph:
                varying.number_read(tx)
        if not in_graph:
            return method_item(self, tx, *args, **kwargs)
        with dynamo.numbers_of_tensors(tx):
            return method_item(self, tx, *args, **kwargs)

    undo.append(dynamo.trace_tensor_method("item", item))

    def remove() -> None:
        for restore in undo:
            restore()

    return remove


def _handler(original: Callable[..., Any], jumps_if_true: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        value = self.stack[-1]
        if effects.depends_on_data(value) and sites.ours(self):
            with sites.guarded(self, "following a loop whose exit depends on data"):
                number = _constant(self, inst, value)
                if number is not None:
                    self.stack[-1] = dynamo.build(self, bool(number))
                    return original(self, inst)
                found = _exit(self, inst)
                if found is not None and _pass_by(self, inst, found, jumps_if_true):
                    return None
                if found is None and any(_loops_around(self)):
                    breaks.branch(self)
        elif sites.ours(self):
            with sites.guarded(self, "taking note of a branch"):
                decisions.truth(self, inst)
        return original(self, inst)

    return handle


def _call_handler(original: Callable[..., Any]) -> Callable[..., Any]:
    return breaks.call_handler(decisions.call_handler(original), lambda tx: any(_loops_around(tx)))


def _constant(tx: Any, inst: Any, value: Any) -> Any:
    """The one number of a tensor that is made of Python values alone; None for all else."""
    found = known.value_of(value) if isinstance(value, dynamo.TensorVariable) else None
    if found is None or found.value.numel() != 1:
        return None
    decisions.note(tx, inst, ("constants", found.constants), None)
    return found.value


def _exit(tx: Any, inst: Any) -> Exit | None:
    code = code_of(tx)
    found = code.exit_of(inst)
    return None if found is None or code.only_raises(code.target(inst, found)) else found


def _in_loop(tx: Any) -> bool:
    """Whether the instruction at work in this frame, or in one that called it, stands in a loop that is not blocked."""
    inner = next(_loops_around(tx), None)
    return inner is not None and not any(sites.blocked(inner, _site(inner, test)) for test in _tests(inner))


def _loops_around(tx: Any) -> Iterator[Any]:
    """This frame and those that called it, as far as the instruction at work stands in a loop."""
    for frame in dynamo.frames(tx):
        if frame.current_instruction is not None and code_of(frame).in_loop(frame.current_instruction):
            yield frame


def _tests(tx: Any) -> Iterator[Any]:
    """The positions of all conditional jumps that leave a loop of this frame."""
    code = code_of(tx)
    for inst in code.instructions:
        if "POP_JUMP" in inst.opname and (found := code.exit_of(inst)) is not None:
            yield found.position


def _site(tx: Any, position: Any) -> str:
    """A test in a frame, and how that frame was reached."""
    return sites.site_of(tx.parent, tx.f_code.co_filename, position)


def _pass_by(tx: Any, inst: Any, exit: Exit, jumps_if_true: bool) -> bool:
    """Go on as if the loop were not left, or leave it after enough visits. False: this is for stock Dynamo."""
    site = _site(tx, exit.position)
    if sites.blocked(tx, site) or code_of(tx).yields:
        return False
    table: dict[str, Visits] = tx.output.__dict__.setdefault("_deq_compile_visits", {})
    iterator = _iterator(tx) if exit.counted else None
    visits = table.get(site)
    if visits is None or exit.guard or visits.iterator is not iterator:
        visits = table[site] = _entered(tx, site, exit, iterator, visits)
    if not exit.guard:
        why = _visit(tx, inst, exit, visits)
        if why is not None:
            _refuse(tx, site, visits, why)
            return False
    value = tx.pop()
    exit_when = jumps_if_true == exit.jumps
    cap = markers.GUARD if exit.guard else visits.cap
    arguments = (value.as_proxy(), site, visits.entry, exit_when, cap)
    node = tx.output.create_proxy("call_function", markers.may_exit, arguments, {}).node
    if not exit.guard:  # a loop's segments are equal, what was not known of its cap at first included
        visits.markers.append(node)
        for earlier in visits.markers:
            earlier.args = (*earlier.args[:4], cap)
    leaves = visits.seen >= markers.UNROLLED
    if leaves:
        if visits.before is not None:
            names = live_after(tx, inst, exit) & code_of(tx).stores(exit.loop)
            observations.serve(tx, (site, visits.entry), sorted(names), visits.before, visits.world, visits.history)
        said.told(tx, inst, exit, (site, visits.entry))
        visits.iterator = object()  # whoever comes again enters anew
        counters.forget(tx)
    if leaves == exit.jumps:
        tx.jump(inst)
    return True


def _refuse(tx: Any, site: str, visits: Visits, why: tuple[Reason, str]) -> None:
    """Leave a loop to stock Dynamo; in a trace without the markers of its iterations, which a pass could take for a loop of so
    many."""
    sites.refuse(tx, site, Skipped(why[0], sites.location(tx), why[1]))
    if visits.markers:
        sites.retrace([site])


def _entered(tx: Any, site: str, exit: Exit, iterator: Any, before: Visits | None) -> Visits:
    """A passage through a loop begins."""
    if before is None:
        sites.watch(tx, site, tx.parent, tx.f_code.co_filename, exit.position)
    visits = Visits(before.entry + 1 if before is not None else 0, _range_left(iterator), iterator)
    visits.range = _range_left(iterator) or (0 if exit.counted and _never_ends(tx) else None)
    return visits


def _visit(tx: Any, inst: Any, exit: Exit, visits: Visits) -> tuple[Reason, str] | None:
    """Take note of one more visit of a loop's test; why the loop is not to be followed any further."""
    why = grows(tx, inst, exit, visits) or leaks(tx, inst, exit, visits)
    why = why or moves(tx, exit, visits) or says_how(tx, inst, exit)
    if why is not None:
        return why
    visits.seen += 1
    visits.sizes.append(len(tx.output.graph.nodes))
    visits.decided.append(len(decisions.log(tx)))
    counters.passed_by(tx, inst)
    visits.cap = counters.cap(tx, code_of(tx), exit, visits.sizes, visits.range)
    if visits.seen < markers.UNROLLED:
        return None
    later = decisions.turns_later(tx, code_of(tx), exit, visits.decided, max(visits.cap, 0))
    return None if later is None else (Reason.COUNTER, later)


def _iterator(tx: Any) -> Any:
    """The range that the innermost `for` of this frame runs through, if it stands on the stack."""
    # lazily wrapped values are left alone: looking would realise them
    return next((v for v in reversed(tx.stack) if type(v) is dynamo.RangeIteratorVariable), None)


def _never_ends(tx: Any) -> bool:
    """Whether the innermost `for` of this frame runs through `itertools.count()`."""
    kinds = (type(v).__name__ for v in reversed(tx.stack))
    return next((kind for kind in kinds if kind.endswith("IteratorVariable")), "") == "CountIteratorVariable"


def _range_left(iterator: Any) -> int:
    """Iterations of a range from this one on, where their number is known; 0 otherwise."""
    left = getattr(iterator, "len", None)
    return left + 1 if isinstance(left, int) else 0
