"""Branches of a loop that do nothing but say something: `if verbose and k % 10 == 0: print(...)`.

A counter that chooses such a branch chooses nothing about the iterates. Where it moves from visit to visit the branch is taken at
every visit, so that its line is kept back like one without a condition (said.py), and the counters are not asked.
"""

from __future__ import annotations

import dis
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deq_compile.markers import PACKAGE
from deq_compile.passes.functionalise import written_argument

from . import dynamo, effects, sites
from .bytecode import Code, code_of

NAMES = ("print", "debug", "info", "warning", "error", "critical", "log")
_BACK = ("JUMP_BACKWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD_NO_INTERRUPT")
_SPEAKS = (
    "LOAD_", "PUSH_NULL", "PRECALL", "CALL", "KW_NAMES", "FORMAT_", "BUILD_STRING", "CONVERT_VALUE", "NOP", "CACHE", "POP_TOP",
    "BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "TO_BOOL", "NOT_TAKEN", "EXTENDED_ARG",
)  # fmt: skip
_ASKS = ("LOAD_", "PUSH_NULL", "PRECALL", "CALL", "NOP", "CACHE", "BINARY_OP", "COMPARE_OP", "CONTAINS_OP", "UNARY_", "TO_BOOL")


@dataclass(frozen=True)
class Branch:
    """A jump, whether the branch is taken by jumping, and the indices of its instructions and of how many lines it says."""

    jump: int
    jumps: bool
    block: frozenset[int]
    lines: int


_branches: weakref.WeakKeyDictionary[Code, dict[int, Branch]] = weakref.WeakKeyDictionary()


def branches(code: Code) -> dict[int, Branch]:
    """By the index of each instruction that asks, or jumps."""
    known = _branches.get(code)
    if known is None:
        known = _branches[code] = dict(_found(code))
    return known


def _found(code: Code) -> Iterator[tuple[int, Branch]]:
    for i, inst in enumerate(code.instructions):
        if "POP_JUMP" not in inst.opname or "NONE" in inst.opname or inst.target is None or not code.in_loop(inst):
            continue
        jump, fall = code.index[id(inst.target)], i + 1
        for start, other, jumps in ((fall, jump, False), (jump, fall, True)):
            run = _straight(code, start, other)
            if run is not None:
                branch = Branch(i, jumps, frozenset(run[0]), run[1])
                yield from ((k, branch) for k in (i, *_asking(code, i)))
                break


def _straight(code: Code, start: int, other: int) -> tuple[list[int], int] | None:
    """Indices of a run of instructions that says something and goes where the other side goes; and how many lines it says."""
    block: list[int] = []
    spoken = popped = 0
    for k in range(start, len(code.instructions)):
        inst = code.instructions[k]
        target = code.index[id(inst.target)] if inst.target is not None else None
        if k == other:
            break
        if inst.opname in (*_BACK, "JUMP_FORWARD"):
            there = code.instructions[other]
            if target == other or (there.opname in _BACK and there.target is inst.target):
                break
            return None
        if "POP_JUMP" in inst.opname:  # `if verbose and k % 10 == 0`
            if target != other or "IF_FALSE" not in inst.opname:
                return None
        elif not inst.opname.startswith(_SPEAKS):
            return None
        names = inst.argval if isinstance(inst.argval, tuple) else (inst.argval,)
        spoken += inst.opname.startswith("LOAD_") and any(name in NAMES for name in names if isinstance(name, str))
        popped += inst.opname == "POP_TOP"
        block.append(k)
    return (block, spoken) if spoken and spoken == popped else None


def _asking(code: Code, jump: int) -> Iterator[int]:
    for k in range(jump - 1, -1, -1):
        if not code.instructions[k].opname.startswith(_ASKS):
            return
        yield k


def install() -> Callable[[], None]:
    """Patch the translators, as the last to do so; returns what takes the patches out again."""
    names = [name for name in dis.opmap if name in ("BINARY_OP", "COMPARE_OP", "CONTAINS_OP") or "POP_JUMP" in name]
    return dynamo.patch_instructions(dict.fromkeys((name for name in names if "NONE" not in name), _handler))


def _stock(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's own handler below those of this package."""
    while getattr(getattr(handler, "__code__", None), "co_filename", "").startswith(PACKAGE):
        handler = handler.__wrapped__  # type: ignore[attr-defined]
    return handler


def _handler(original: Callable[..., Any]) -> Callable[..., Any]:
    stock = _stock(original)

    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        if sites.ours(self):
            with sites.guarded(self, "looking at a branch that says something"):
                code = code_of(self)
                branch = branches(code).get(code.index.get(id(inst), -1))
                site = None if branch is None else sites.site_of(self, "say only", branch.jump)
            if branch is not None and site is not None and not sites.blocked(self, site):
                if "POP_JUMP" not in inst.opname:
                    _note(self, branch, inst)
                    return stock(self, inst)
                if _moved(self, branch) and self.stack[-1].is_python_constant():
                    self.output.__dict__.setdefault("_deq_compile_forced", {})[id(self), branch] = self, site
                    self.output._deq_compile_before_branch = _world(self)
                    self.pop()
                    return self.jump(inst) if branch.jumps else None
        return original(self, inst)

    return handle


def _note(tx: Any, branch: Branch, inst: Any) -> None:
    """Take note of the numbers that a branch asks about."""
    known = [
        v.as_python_constant() for v in tx.stack[-2:] if type(v) is not dynamo.LazyVariableTracker and v.is_python_constant()
    ]
    asked = tx.__dict__.setdefault("_deq_compile_asked", {}).setdefault(branch, {})
    asked.setdefault(id(inst), set()).add(tuple(v for v in known if type(v) in (int, float)))


def _moved(tx: Any, branch: Branch) -> bool:
    """Whether they have changed since the first visit."""
    asked = tx.__dict__.get("_deq_compile_asked", {}).get(branch, {})
    return any(len(numbers) > 1 for numbers in asked.values())


def call(tx: Any, fn: Any, speaks: bool) -> None:
    """Give a branch back that may do something: it would be done in every iteration. That is one that calls more than what looks
    at a number, or before whose line (`speaks`) something has changed.

    Raises:
        Retrace: so that Dynamo traces the frame again.
    """
    at = code_of(tx).index.get(id(tx.current_instruction), -1)
    here = [site for (_, branch), (frame, site) in forced(tx).items() if frame is tx and at in branch.block]
    if here and (_does(tx) if speaks else not _only_looks(fn)):
        sites.retrace(here)


def _world(tx: Any) -> tuple[int, effects.Snapshot]:
    return len(tx.output.graph.nodes), effects.snapshot(tx, tx.symbolic_locals)


def _does(tx: Any) -> bool:
    """Whether something was written since the branch was taken: by a property, say."""
    count, before = tx.output._deq_compile_before_branch
    nodes = list(tx.output.graph.nodes)[count:]
    changed = effects.changed(before, effects.snapshot(tx, tx.symbolic_locals))
    return changed is not None or any(written_argument(node) is not None for node in nodes)


_LOOKS = ("item", "tolist", "norm", "mean", "sum", "max", "min", "abs", "sqrt", "detach", "cpu", "float", "double", "format")
_MAKES = (float, int, bool, round, str, repr, len, abs, min, max, sum)


def _only_looks(fn: Any) -> bool:
    """Whether a call is one of a tensor, a text or Python's own that changes nothing."""
    fn = fn.realize() if type(fn) is dynamo.LazyVariableTracker else fn
    owner, name = dynamo.method_of(fn)
    if owner is not None:
        return name in _LOOKS and (isinstance(owner, dynamo.TensorVariable | dynamo.SymNodeVariable) or dynamo.is_plain(owner))
    return any(fn.__dict__.get("fn") is f for f in _MAKES)


def forced(tx: Any) -> dict[Any, tuple[Any, str]]:
    """The branches that were taken for their lines' sake: (id of a translator, branch) -> that translator, and the site."""
    found: dict[Any, tuple[Any, str]] = tx.output.__dict__.get("_deq_compile_forced", {})
    return found
