"""What Python decides in each iteration of a loop, in the loop's own frame and in all that it calls.

    if k > 20: ...          rates[k]          max(k - 30, 0)          next(schedule)

Capture traces a few iterations of a loop that it follows. Where such an operation gets other numbers in each of them, the graph
shows what it came to in these, and not what it comes to later. A comparison of numbers that move by equal steps is looked at
for all iterations up to the loop's cap; whatever else gets other numbers in each iteration has the loop left alone.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

from deq_compile.torch_parts import free_unbacked_symbols

from . import dynamo, effects, held, sites
from .bytecode import Code, Exit
from .counters import turns

_TRUTHS = ("UNARY_NOT", "TO_BOOL", "JUMP_IF_TRUE_OR_POP", "JUMP_IF_FALSE_OR_POP")
# Sums and products of numbers that move by equal steps are looked at where they are compared.
_LINEAR = ("ADD", "SUBTRACT", "MULTIPLY", "TRUE_DIVIDE")
_LINEAR_SIGNS = {"+", "-", "*", "/", "+=", "-=", "*=", "/="}
_BINARY = tuple(n for n in dis.opmap if n.startswith(("BINARY_", "INPLACE_")) and n.partition("_")[2] not in _LINEAR)
OPCODES = ("COMPARE_OP", "CONTAINS_OP", "FOR_ITER", "BUILD_STRING", *_TRUTHS, *_BINARY)
_NAMES = [sign for _, sign in getattr(dis, "_nb_ops", ())]  # of BINARY_OP's argument, from Python 3.11 on
_ENOUGH = 3  # iterations alike, to tell a step from another


@dataclasses.dataclass(frozen=True)
class Decision:
    """An instruction that Python alone carried out, on what, and (a comparison of two numbers) by which operator. `lengths` are
    those of containers of which it takes what a longer one has elsewhere."""

    code: Any
    inst: Any
    operands: tuple[Any, ...]
    operator: str | None = None
    lengths: tuple[int, ...] = ()

    def place(self) -> tuple[int, int]:
        return id(self.code), id(self.inst)


def log(tx: Any) -> list[Decision]:
    """All decisions of a trace so far, in order."""
    found: list[Decision] = tx.output.__dict__.setdefault("_deq_compile_decisions", [])
    return found


def handler(original: Callable[..., Any]) -> Callable[..., Any]:
    """A translator's handler of an operation on the stack that takes note of its operands."""

    @functools.wraps(original)
    def handle(self: Any, inst: Any) -> Any:
        if (inst.opname == "BINARY_OP" and _NAMES[inst.arg] in _LINEAR_SIGNS) or not sites.ours(self):
            return original(self, inst)
        if inst.opname == "BUILD_STRING":
            return _joined(self, inst, original)
        count = 1 if inst.opname in (*_TRUTHS, "FOR_ITER") else 3 if inst.opname == "BINARY_SLICE" else 2
        variables = self.stack[-count:]
        before, lengths = _held(self, variables), _lengths(inst, variables)
        result = original(self, inst)
        with sites.guarded(self, "taking note of a decision"):
            note(self, inst, _settled(self, before), inst.argval if inst.opname == "COMPARE_OP" else None, lengths)
        return result

    return handle


def truth(tx: Any, inst: Any) -> None:
    """Take note of a jump by the truth of what is no tensor."""
    note(tx, inst, _settled(tx, _held(tx, tx.stack[-1:])), None)


def texts(tx: Any) -> dict[str, Any]:
    """Texts that numbers were written into, and the numbers written last: two numbers may be one text."""
    found: dict[str, Any] = tx.output.__dict__.setdefault("_deq_compile_texts", {})
    return found


def _joined(tx: Any, inst: Any, original: Callable[..., Any]) -> Any:
    parts = [_text(v) for v in tx.stack[-inst.arg :]]
    result = original(tx, inst)
    numbers = tuple(texts(tx)[part] for part in parts if part in texts(tx))
    if numbers and (text := _text(tx.stack[-1])) is not None:
        texts(tx)[text] = numbers
    return result


def _text(variable: Any) -> str | None:
    value = variable.as_python_constant() if dynamo.is_plain(variable) else None
    return value if type(value) is str else None


def _lengths(inst: Any, variables: Sequence[Any]) -> tuple[int, ...]:
    """Of a list that a piece is taken of, and of a queue that will lose what is in it."""
    first, kind = variables[0], type(variables[-1]).__name__
    items = first.__dict__.get("items")
    cut = inst.opname == "BINARY_SLICE" or kind == "SliceVariable"
    loses = type(first).__name__ == "DequeVariable" and len(variables) > 1
    return (len(items),) if isinstance(items, list) and (cut or loses) else ()


def note(tx: Any, inst: Any, operands: tuple[Any, ...], operator: Any, lengths: tuple[int, ...] = ()) -> None:
    numbers = all(type(o) in (int, float) for o in operands)
    if numbers and (len(operands) == 1):
        operands, operator = (*operands, 0), "!="
    if lengths or any(o is not None for o in operands):
        spelled = str(operator).removeprefix("bool(").removesuffix(")") if operator is not None and numbers else None
        log(tx).append(Decision(tx.f_code, inst, operands, spelled, lengths))


def call_handler(original: Callable[..., Any]) -> Callable[..., Any]:
    """A translator's `call_function` that takes note of calls which Python carries out: `max(k, 3)`, `rates.get(k)`. What is
    traced into shows its own decisions."""

    @functools.wraps(original)
    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if not sites.ours(self):
            return original(self, fn, args, kwargs)
        with sites.guarded(self, "looking at a call"):
            operands = [*_receiver(self, fn), *_held(self, [*args, *kwargs.values()])]
        outcome = original(self, fn, args, kwargs)
        with sites.guarded(self, "taking note of a call"):
            if not _is_traced(fn):
                found = _settled(self, operands)
                if not _is_harmless(fn, found, self.stack[-1]):
                    note(self, self.current_instruction, (*found, "call"), None)
        return outcome

    return call_function


def turns_later(tx: Any, code: Code, exit: Exit, places: Sequence[int], most: int, alone: bool = False) -> str | None:
    """Why later iterations may do something else than those traced; None where they don't.

    Args:
        places: sizes of the log when the loop's test was met, in each iteration so far.
        most: the loop's cap, 0 for none.
        alone: whether the end of its range is all that ends the loop: what leaves it elsewhere raises.
    """
    windows = [log(tx)[a:b] for a, b in itertools.pairwise(places)]
    last = [d.place() for d in windows[-1]]
    alike = list(itertools.takewhile(lambda w: [d.place() for d in w] == last, reversed(windows)))[::-1]
    if len(alike) < _ENOUGH:
        return "the loop takes another way in each iteration"
    for column in zip(*alike, strict=True):
        same = len({d.operands for d in column}) == 1 and column[-1].lengths == column[-2].lengths
        if same or _leaves(tx, code, exit, column[-1], alone):
            continue
        # the last window holds parts of two iterations: the earlier one is meant
        turn = _turn(column)
        if turn and (most == 0 or len(places) - 2 + turn < most):
            line = getattr(column[-1].inst.positions, "lineno", None)
            if column[-1].operator is None:
                return f"what line {line} makes of a counter may be another in a later iteration"
            return f"the comparison in line {line} comes out otherwise in a later iteration"
    return None


def _turn(column: Sequence[Decision]) -> int:
    """After how many iterations a decision comes out otherwise, as far as is known; 0 for never."""
    operator = column[-1].operator
    if operator is None or any(d.operator != operator for d in column):
        return 1
    steps = {tuple(b - a for a, b in zip(x.operands, y.operands, strict=True)) for x, y in itertools.pairwise(column)}
    found = turns(operator, column[-1].operands, steps.pop()) if len(steps) == 1 else None
    return 1 if found is None else found


def _leaves(tx: Any, code: Code, exit: Exit, decision: Decision, alone: bool) -> bool:
    """Whether a decision is whether to leave the loop: then it is counted elsewhere."""
    if decision.code is not tx.f_code or id(decision.inst) not in code.index:
        return False
    i = code.index[id(decision.inst)]
    if i not in exit.loop:
        return False
    if alone or decision.inst.opname == "FOR_ITER":
        return decision.inst.opname == "FOR_ITER" and any(k not in exit.loop for k in code.successors[i])
    for j in range(i, min(i + 3, len(code.instructions))):
        if "POP_JUMP" in code.instructions[j].opname:
            return any(k not in exit.loop for k in code.successors[j])
    return False


def _held(tx: Any, variables: Sequence[Any]) -> list[Any]:
    """Operands, as they are now; (variable,) for what Dynamo has not looked at yet."""
    return [(v,) if dynamo.is_unseen(v) else ((), _described(tx, v)) for v in variables]


def _settled(tx: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(o[1] if len(o) == 2 else _described(tx, o[0]) for o in operands)


def _described(tx: Any, variable: Any, depth: int = 2) -> Any:
    """What tells an operand from another; None for tensors, which the graph shows, and for all that has no value here."""
    if dynamo.is_unseen(variable):
        return None
    variable = variable.realize() if hasattr(variable, "realize") else variable
    if isinstance(variable, dynamo.SymNodeVariable):
        return None if free_unbacked_symbols(variable.sym_num) else ("symbol", str(variable.sym_num))
    if isinstance(variable, dynamo.TensorVariable):
        return None
    kind = type(variable).__name__
    if held.is_iterator(variable):
        return None if kind == "CountIteratorVariable" else (kind, _taken(tx, variable))
    if kind in ("ConstantVariable", "EnumVariable"):
        value = variable.as_python_constant()
        written = texts(tx).get(value) if tx is not None and type(value) is str else None
        return _plain(value) if type(value) in (int, float) else (type(value).__name__, hash(repr(value)), written)
    items = variable.__dict__.get("items")
    if depth and isinstance(items, list | tuple | dict):
        inside = [_described(tx, v, depth - 1) for v in (items.values() if isinstance(items, dict) else items)]
        return (kind, *inside) if any(v is not None for v in inside) else None
    return None  # objects: their methods show their own decisions, and to ask for a value would trace some


def _plain(value: float) -> int | float:
    return int(value) if type(value) is float and value.is_integer() else value


def _taken(tx: Any, iterator: Any) -> int:
    """How many calls of `next` an iterator has seen."""
    seen: dict[int, list[Any]] = tx.output.__dict__.setdefault("_deq_compile_iterators", {})
    entry = seen.setdefault(id(iterator), [iterator, 0])  # held, so that no other gets its id
    entry[1] += 1
    return int(entry[1])


def _receiver(tx: Any, fn: Any) -> list[Any]:
    """What a method belongs to. Of a container of tensors or modules, the length tells: `layers.pop(0)`."""
    owner = fn.__dict__.get("obj")
    if owner is None:
        return []
    items = owner.__dict__.get("items")
    return [((), len(items)), *_held(tx, [owner])] if isinstance(items, list | dict) else _held(tx, [owner])


def _is_traced(fn: Any) -> bool:
    """Whether Dynamo traces into a function: what is decided in there is seen there."""
    fn = fn.realize() if hasattr(fn, "realize") and not dynamo.is_unseen(fn) else fn
    try:
        return (hasattr(fn, "get_code") and fn.get_code() is not None) or _is_callable_object(fn)
    except NotImplementedError:
        return False


def _is_callable_object(fn: Any) -> bool:
    value = fn.__dict__.get("value")
    return not isinstance(value, type) and isinstance(inspect.getattr_static(type(value), "__call__", None), types.FunctionType)


_BY_TYPE = (isinstance, issubclass, type, callable)
_THE_SAME = (int, float)
_CHANGES = ("append", "extend", "insert", "add", "update", "__setattr__", "__setitem__")


def _is_harmless(fn: Any, operands: tuple[Any, ...], result: Any) -> bool:
    """Whether a call's result is in the graph, is the number that it was given, or depends on types alone."""
    fn = fn.realize() if hasattr(fn, "realize") and not dynamo.is_unseen(fn) else fn
    name = fn.__dict__.get("name", fn.__dict__.get("method_name"))
    if effects.depends_on_data(result) or name in _CHANGES:
        return True
    function = fn.__dict__.get("fn")
    if any(function is known for known in _BY_TYPE):
        return True
    return any(function is f for f in _THE_SAME) and len(operands) == 1 and _described(None, result) == operands[0]
