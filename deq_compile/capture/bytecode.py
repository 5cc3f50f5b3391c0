"""Questions about the bytecode of a loop: which side of a branch leaves it, and what is done only there.

All of it works on Dynamo's `Instruction` lists, read only: opname, argval, target, positions.
"""

from __future__ import annotations

import dis
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_UNCONDITIONAL = {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD_NO_INTERRUPT"}
_IN_A_CALL = ("PRECALL", "CALL", "GET_ITER", "NOP", "CACHE", "PUSH_NULL", "STORE_FAST")
_RAISES = {"RAISE_VARARGS", "RERAISE"}
_ENDS = {"RETURN_VALUE", "RETURN_CONST"} | _RAISES


@dataclass(frozen=True)
class Exit:
    """A conditional jump that leaves a loop.

    jumps     the loop is left by jumping, not by falling through
    loop      indices of the loop's instructions
    position  of the test in the source, and which of the jumps of one test it is; a `while` loop's guard before the loop
              has those of the test in it
    counted   the loop is a `for`: an iterator stands on the stack while it runs
    guard     whether this is that guard
    """

    jumps: bool
    loop: frozenset[int]
    position: Any
    counted: bool
    guard: bool = False


class Code:
    """The control flow of one function; `yields` says that it is a generator, whose iterations are others' to make."""

    def __init__(self, instructions: Sequence[Any]) -> None:
        self.instructions = instructions
        self.yields = any(inst.opname in ("YIELD_VALUE", "RETURN_GENERATOR") for inst in instructions)
        self.index = {id(inst): i for i, inst in enumerate(instructions)}
        self.successors: list[list[int]] = []
        for i, inst in enumerate(instructions):
            after = [] if inst.opname in _UNCONDITIONAL | _ENDS or i + 1 == len(instructions) else [i + 1]
            if inst.target is not None and ("JUMP" in inst.opname or inst.opname in ("FOR_ITER", "SEND")):
                after.append(self.index[id(inst.target)])
            caught = getattr(inst, "exn_tab_entry", None) if inst.opname in _RAISES else None
            if caught is not None:  # by the function itself, which may go on from there
                after.append(self.index[id(caught.target)])
            self.successors.append(after)
        self.predecessors: list[list[int]] = [[] for _ in instructions]
        for i, after in enumerate(self.successors):
            for j in after:
                self.predecessors[j].append(i)

    def _reach(self, edges: list[list[int]], start: int, allowed: set[int]) -> set[int]:
        seen: set[int] = set()
        stack = [start]
        while stack:
            for j in edges[stack.pop()]:
                if j in allowed and j not in seen:
                    seen.add(j)
                    stack.append(j)
        return seen

    def reachable(self, start: int) -> set[int]:
        return {start} | self._reach(self.successors, start, set(range(len(self.instructions))))

    def in_loop(self, inst: Any) -> bool:
        """Whether an instruction can be reached from itself."""
        i = self.index.get(id(inst))
        return i is not None and i in self._reach(self.successors, i, set(range(len(self.instructions))))

    def counts_a_loop(self, inst: Any) -> bool:
        """Whether what an instruction gives is the argument of a `range` that a `for` runs through, or a name for that."""
        i = self.index.get(id(inst))
        if i is None:
            return False
        name = None
        for later in self.instructions[i + 1 :]:
            if later.opname == "STORE_FAST":
                name = later.argval
            if not later.opname.startswith(_IN_A_CALL):
                break
            if later.opname == "GET_ITER":
                return any(before.argval == "range" for before in self.instructions[max(0, i - 12) : i])
        return name is not None and any(
            later.opname == "LOAD_FAST" and later.argval == name and self._into_a_range(k)
            for k, later in enumerate(self.instructions)
        )

    def loop_through(self, inst: Any) -> Any:
        """The FOR_ITER that runs through what a call gives, if nothing else gets hold of that; or None."""
        at = self.index.get(id(inst), len(self.instructions))
        after = [later for later in self.instructions[at + 1 : at + 4] if later.opname not in ("CACHE", "NOP")][:2]
        return after[1] if [later.opname for later in after] == ["GET_ITER", "FOR_ITER"] else None

    def loop_counted_by(self, inst: Any) -> Any:
        """The FOR_ITER of the loop whose `range` ends at what an instruction gives, where that goes nowhere else; or None."""
        i = self.index.get(id(inst))
        if i is None or not self.counts_a_loop(inst):
            return None
        name = None
        for k in range(i + 1, len(self.instructions)):
            later = self.instructions[k]
            if later.opname == "FOR_ITER":
                return later
            if later.opname == "STORE_FAST":
                name = later.argval
                break
            if not later.opname.startswith(_IN_A_CALL):
                return None
        reads = [k for k, later in enumerate(self.instructions) if "LOAD" in later.opname and later.argval == name]
        if len(reads) != 1 or not self._into_a_range(reads[0]):
            return None
        return next((later for later in self.instructions[reads[0] :] if later.opname == "FOR_ITER"), None)

    def _into_a_range(self, k: int) -> bool:
        """Whether the value loaded at k is the last argument of a `range` that is iterated at once."""
        after = []
        for later in self.instructions[k + 1 :]:
            after.append(later.opname)
            if not later.opname.startswith(_IN_A_CALL):
                break
        return "GET_ITER" in after and any(before.argval == "range" for before in self.instructions[max(0, k - 4) : k])

    def exit_of(self, inst: Any) -> Exit | None:
        """What a conditional jump leaves: the innermost loop that holds one of its sides and not the other."""
        return self._exit_inside(inst) or self._guard(inst)

    def _exit_inside(self, inst: Any) -> Exit | None:
        i = self.index.get(id(inst))
        if i is None or inst.target is None or i + 1 == len(self.instructions):
            return None
        jump, fall, allowed = self.index[id(inst.target)], i + 1, set(range(len(self.instructions)))
        while True:
            component = self._reach(self.successors, i, allowed) & self._reach(self.predecessors, i, allowed)
            if i not in component:
                return None
            if (jump in component) != (fall in component):
                return Exit(fall in component, frozenset(component), self._position(inst, True), self._counted(component))
            # both sides stay in this loop: look at the loops inside of it, those that avoid its entry
            entries = [u for u in component if any(p not in component for p in self.predecessors[u])] or [min(component)]
            allowed = component - {min(entries)}
            if i not in allowed:
                return None

    def _guard(self, inst: Any) -> Exit | None:
        """CPython tests the condition of `while` once before the loop and once at its end, from one place in the source."""
        if inst.positions is None:
            return None
        for other in self.instructions:
            if other is inst or other.positions != inst.positions or "POP_JUMP" not in other.opname:
                continue
            found = self._exit_inside(other)
            if found is not None:
                exit_when = ("TRUE" in other.opname) == found.jumps
                place = self._position(inst, False)
                if place[1] != found.position[1]:
                    continue
                return Exit(("TRUE" in inst.opname) == exit_when, found.loop, place, found.counted, guard=True)
        return None

    def _position(self, inst: Any, inside: bool) -> tuple[Any, int]:
        """Of `a or b` all jumps have one place in the source: count them, those in a loop and those of its guard apart."""
        place = tuple(inst.positions or ())
        before = self.instructions[: self.index[id(inst)]]
        alike = [j for j in before if "POP_JUMP" in j.opname and tuple(j.positions or ()) == place and self.in_loop(j) == inside]
        return place, len(alike)

    def _counted(self, component: set[int]) -> bool:
        headers = (i for i in component if self.instructions[i].opname == "FOR_ITER")
        return any(self.index[id(self.instructions[i].target)] not in component for i in headers)

    def target(self, inst: Any, exit: Exit) -> int:
        """Where the loop is left to."""
        return self.index[id(inst.target)] if exit.jumps else self.index[id(inst)] + 1

    def only_raises(self, start: int, limit: int = 40) -> bool:
        """Whether a straight run of instructions ends in a raise: an assertion, not an exit."""
        for inst in self.instructions[start : start + limit]:
            if inst.opname in _RAISES:
                return True
            if inst.opname in _ENDS or inst.target is not None:
                return False
        return False

    def stores(self, where: Any) -> set[str]:
        """Local names that instructions store to."""
        names: set[str] = set()
        for i in where:
            inst = self.instructions[i]
            if inst.opname == "STORE_FAST_LOAD_FAST":
                names.add(inst.argval[0])
            elif inst.opname.startswith("STORE_FAST") or inst.opname in ("STORE_DEREF", "STORE_GLOBAL", "STORE_NAME"):
                names.update(inst.argval if isinstance(inst.argval, tuple) else (inst.argval,))
        return names

    def one_sided(self, inst: Any, exit: Exit) -> tuple[set[int], set[int]]:
        """Instructions done only when the loop is left here, and only when it ends in another way (exhausted, or `else`)."""
        here = self.reachable(self.target(inst, exit)) - exit.loop
        ends = {
            j for i in exit.loop for j in self.successors[i]
            if j not in exit.loop and i != self.index[id(inst)] and self.instructions[i].opname != "SEND"
        }  # fmt: skip
        elsewhere: set[int] = set()
        for j in ends:
            elsewhere |= self.reachable(j)
        elsewhere -= exit.loop
        if exit.guard or not elsewhere:
            return set(), set()
        return here - elsewhere, elsewhere - here

    def constants(self, where: set[int]) -> Counter[str]:
        """Constants that instructions push or return."""
        found: Counter[str] = Counter()
        for i in where:
            inst = self.instructions[i]
            if inst.opcode in dis.hasconst and inst.opname in ("LOAD_CONST", "RETURN_CONST", "LOAD_SMALL_INT"):
                found[repr(inst.argval)] += inst.argval is not None
        return +found


_codes: weakref.WeakKeyDictionary[Any, Code] = weakref.WeakKeyDictionary()  # by code object


def code_of(tx: Any) -> Code:
    """The code that a translator traces."""
    # the instruction list is Dynamo's own for each translator, its offsets those of the code object
    known = _codes.get(tx.f_code)
    if known is None or known.instructions is not tx.instructions:
        known = _codes[tx.f_code] = Code(tx.instructions)
    return known
