"""The one place that names Dynamo's private parts (torch 2.11 to 2.14). Everything is `Any`: none of it is a promise.

A name that a torch does not have is an `Absent` (torch_parts.py): the feature of capture that needs it stays off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from deq_compile.torch_parts import find, free_unbacked_symbols

config = find("torch._dynamo", "config")
reset_code = find("torch._dynamo", "reset_code")
graph_break = find("torch._dynamo", "graph_break")
InstructionTranslator = find("torch._dynamo.symbolic_convert", "InstructionTranslator")
InliningInstructionTranslator = find("torch._dynamo.symbolic_convert", "InliningInstructionTranslator")
InliningGeneratorInstructionTranslator = find("torch._dynamo.symbolic_convert", "InliningGeneratorInstructionTranslator")
livevars_analysis = find("torch._dynamo.bytecode_analysis", "livevars_analysis")
VariableTracker = find("torch._dynamo.variables.base", "VariableTracker")
CellVariable = find("torch._dynamo.variables", "CellVariable")
LazyVariableTracker = find("torch._dynamo.variables", "LazyVariableTracker")
SymNodeVariable = find("torch._dynamo.variables", "SymNodeVariable")
TensorVariable = find("torch._dynamo.variables", "TensorVariable")
TorchInGraphFunctionVariable = find("torch._dynamo.variables", "TorchInGraphFunctionVariable")
UnspecializedPythonVariable = find("torch._dynamo.variables", "UnspecializedPythonVariable")
UserFunctionVariable = find("torch._dynamo.variables", "UserFunctionVariable")
AutogradFunctionVariable = find("torch._dynamo.variables", "AutogradFunctionVariable")
RangeIteratorVariable = find("torch._dynamo.variables.lists", "RangeIteratorVariable")
RemovableHandleVariable = find("torch._dynamo.variables", "RemovableHandleVariable")
ValueMutationNew = find("torch._dynamo.variables.base", "ValueMutationNew")
wrap_fx_proxy = find("torch._dynamo.variables.builder", "wrap_fx_proxy")
AttributeMutationExisting = find("torch._dynamo.variables.base", "AttributeMutationExisting")
ConstantVariable = find("torch._dynamo.variables", "ConstantVariable")
DebuggingVariable = find("torch._dynamo.variables.misc", "DebuggingVariable")
StringFormatVariable = find("torch._dynamo.variables.misc", "StringFormatVariable")
GlobalSource = find("torch._dynamo.source", "GlobalSource")
AttrSource = find("torch._dynamo.source", "AttrSource")
WeakTensorKeyDictionary = find("torch.utils.weak", "WeakTensorKeyDictionary")
VariableBuilder = find("torch._dynamo.variables.builder", "VariableBuilder")
OptimizedModule = find("torch._dynamo.eval_frame", "OptimizedModule")
DDPOptimizer = find("torch._dynamo.backends.distributed", "DDPOptimizer")
DynamoException = find("torch._dynamo.exc", "TorchDynamoException")
RestartAnalysis = find("torch._dynamo.exc", "RestartAnalysis")  # a frame is traced again
# the one exception by which a backend can have a frame traced again
RestartFromBackend = find("torch._dynamo.exc", "TensorifyScalarRestartAnalysis")


def tensor_method(name: str) -> Any:
    """What traces a method of a tensor, (variable, tx, *args, **kwargs) -> variable; None where nothing special does.

    Torch 2.14 has a table of them, {name: Method(handler)}; before that they are attributes, `method_<name>`.
    """
    table = getattr(TensorVariable, "tp_methods", None)
    if table is None:
        return getattr(TensorVariable, f"method_{name}", None)
    return table[name].handler if name in table else None


def trace_tensor_method(name: str, handler: Callable[..., Any]) -> Callable[[], None]:
    """Have a method of a tensor traced by `handler`; returns what brings the former state back.

    A handler that returns None hands the call to what Dynamo does with a method that it does not know.
    """
    table = getattr(TensorVariable, "tp_methods", None)
    if table is not None:
        places, key, value = table, name, importlib.import_module("torch._dynamo.variables.base").Method(handler)
        had, before = key in places, places.get(key)
        places[key] = value

        def restore() -> None:
            if had:
                places[key] = before
            else:
                places.pop(key, None)
    else:
        attribute = f"method_{name}"
        had, before = hasattr(TensorVariable, attribute), getattr(TensorVariable, attribute, None)
        setattr(TensorVariable, attribute, handler)

        def restore() -> None:
            if had:
                setattr(TensorVariable, attribute, before)
            else:
                delattr(TensorVariable, attribute)

    return restore


def attribute(tx: Any, variable: Any, name: str) -> Any:
    """Dynamo's variable for an attribute of what a variable stands for. Torch 2.14 has a function of its own for that."""
    if hasattr(variable, "var_getattr"):
        return variable.var_getattr(tx, name)
    return importlib.import_module("torch._dynamo.variables.object_protocol").generic_getattr(tx, variable, name)


def translators() -> list[Any]:
    """The classes that trace frames, those that share a table of handlers once."""
    classes = [InstructionTranslator, InliningInstructionTranslator, InliningGeneratorInstructionTranslator]
    return list({id(cls.dispatch_table): cls for cls in classes}.values())


Handler = Callable[..., Any]


def patch_instructions(made: Mapping[str, Callable[[Handler], Handler]]) -> Callable[[], None]:
    """Put other handlers of instructions in the place of the translators' own, where they have any; returns what brings those
    back."""
    undo = []
    for cls in translators():
        for name, wrap in made.items():
            opcode = dis.opmap.get(name)
            if opcode is not None and cls.dispatch_table[opcode] is not None:
                undo.append((cls, opcode, cls.dispatch_table[opcode]))
                cls.dispatch_table[opcode] = wrap(cls.dispatch_table[opcode])

    def restore() -> None:
        for cls, opcode, handler in undo:
            cls.dispatch_table[opcode] = handler

    return restore


def patch_calls(made: Callable[[Handler], Handler]) -> Callable[[], None]:
    """Put another method in the place of the one by which translators call functions; returns what brings it back."""
    return _patch(InstructionTranslator, "call_function", made)


def patch_run(made: Callable[[Handler], Handler]) -> Callable[[], None]:
    """The same of the method by which translators trace a frame."""
    return _patch(InstructionTranslator, "run", made)


def patch_builder(made: Callable[[Handler], Handler]) -> Callable[[], None]:
    """The same of the method by which values from outside become variables."""
    return _patch(VariableBuilder, "_wrap", made)


def _patch(cls: Any, name: str, made: Callable[[Handler], Handler]) -> Callable[[], None]:
    owner = next(base for base in cls.__mro__ if name in vars(base))
    original = vars(owner)[name]
    setattr(owner, name, made(original))
    return lambda: setattr(owner, name, original)


@contextlib.contextmanager
def numbers_of_tensors(tx: Any) -> Iterator[None]:
    """Trace `tensor.item()` as a number of the graph, where Dynamo by default would end the graph."""
    shape_env = tx.output.shape_env
    if not shape_env.allow_scalar_outputs:
        shape_env.settings = dataclasses.replace(shape_env.settings, allow_scalar_outputs=True)
    with config.patch(capture_scalar_outputs=True):
        yield


def build(tx: Any, value: Any) -> Any:
    """Dynamo's variable for a Python value."""
    return VariableTracker.build(tx, value)


def attribute_source(source: Any, name: str) -> Any:
    return AttrSource(source, name)


def name_of(source: Any) -> str:
    """How a source is spelled. Torch 2.11 has a method for it."""
    return str(source.name() if callable(source.name) else source.name)


def build_from(tx: Any, value: Any, source: Any, name: str) -> Any:
    """The variable for an attribute, guarded, of what has a source."""
    return VariableTracker.build(tx, value, source=AttrSource(source, name))


def entries_of(matrix: Any) -> tuple[Any, Any]:
    """Indices and values of a COO matrix, coalesced or not; the values as a copy where there has to be a gradient, since Dynamo
    looks at what a view is of."""
    return matrix._indices(), matrix.values().clone() if matrix.requires_grad else matrix._values()


def method_of(fn: Any) -> tuple[Any, str]:
    """The variable that a bound method belongs to, and its name; (None, "") for all else."""
    known = fn.__dict__
    # by version of Dynamo, and by what the method is bound to
    names = known.get("name"), known.get("method_name"), getattr(known.get("descriptor"), "__name__", None)
    name = next((n for n in names if isinstance(n, str)), "")
    return (known.get("obj"), name) if name and "obj" in known else (None, "")


def items_of(tx: Any, variable: Any) -> list[Any]:
    """The variables in a tuple."""
    variable = variable.realize() if hasattr(variable, "realize") else variable
    return list(variable.items)


def constant(tx: Any, variable: Any) -> Any:
    """The Python value of a variable; a number that may change is held to what it is, by a guard.

    Raises:
        LookupError: it has none.
    """
    variable = variable.realize() if hasattr(variable, "realize") else variable
    if isinstance(variable, SymNodeVariable) and not free_unbacked_symbols(variable.sym_num):
        return variable.evaluate_expr(tx.output)
    if variable.is_python_constant():
        return variable.as_python_constant()
    raise LookupError(type(variable).__name__)


def is_from_outside(tx: Any, variable: Any) -> bool:
    """Whether a variable is an integer that the graph has as a symbol, made of inputs of the frame, not of a tensor's sizes."""
    variable = variable.realize() if hasattr(variable, "realize") else variable
    if not is_symbolic(variable) or is_unknown(variable):
        return False
    symbols, of = variable.sym_num.node.expr.free_symbols, tx.output.shape_env.var_to_sources
    return any(not hasattr(source, "prop") for symbol in symbols for source in of.get(symbol, ())[:1])


def is_open(tx: Any, variable: Any) -> bool:
    """Whether a variable is an integer of which the graph need not know what it is in this call."""
    variable = variable.realize() if hasattr(variable, "realize") else variable
    if is_integer_tensor(variable) or is_from_outside(tx, variable):
        return True
    return is_symbolic(variable) and is_unknown(variable)


def is_drawn(variable: Any) -> bool:
    """Whether a variable is a number that Python draws in every call: an input of the graph, a tensor."""
    return isinstance(variable, UnspecializedPythonVariable)


def is_integer_tensor(variable: Any) -> bool:
    """Whether a variable is a tensor that Python takes for an integer."""
    if not isinstance(variable, TensorVariable):
        return False
    example = variable.as_proxy().node.meta.get("example_value")
    return (
        isinstance(example, torch.Tensor) and not (example.is_floating_point() or example.is_complex()) and example.numel() == 1
    )


def number_in(tx: Any, variable: Any) -> Any:
    """The variable of the number in a tensor, as one of the graph, of which nothing is known when the graph is made."""
    with numbers_of_tensors(tx):
        return wrap_fx_proxy(tx, tx.output.create_proxy("call_method", "item", (variable.as_proxy(),), {}))


def has_changed(tx: Any, variable: Any) -> bool:
    """Whether such an integer is a symbol because Dynamo has seen it with several values. Where everything is symbolic from the
    first call on (`dynamic=True`) nobody knows."""
    return bool(config.assume_static_by_default) and is_from_outside(tx, variable)


def is_symbolic(variable: Any) -> bool:
    """Whether a variable is an integer of the graph."""
    return isinstance(variable, SymNodeVariable) and isinstance(variable.sym_num, torch.SymInt)


def may_be(variable: Any, least: int) -> bool:
    """Whether a number of the graph is not less than that; the frame is guarded on the answer, where there is one."""
    return is_unknown(variable) or bool(variable.sym_num >= least)


def is_unknown(variable: Any) -> bool:
    """Whether nothing is known of a number of the graph when the graph is made."""
    return bool(free_unbacked_symbols(variable.sym_num))


def traced(tx: Any, function: Callable[..., Any], *args: Any) -> Any:
    """The variable that `function` of variables and Python numbers gives, traced."""
    given = [a if isinstance(a, VariableTracker) else build(tx, a) for a in args]
    return UserFunctionVariable(function).call_function(tx, given, {})


def is_unseen(variable: Any) -> bool:
    """Whether Dynamo has not looked at a variable yet; to ask it for anything would make it do so."""
    return isinstance(variable, LazyVariableTracker) and not variable.is_realized()


def unseen(variable: Any) -> Any:
    """The Python value of a lazy variable that Dynamo has not looked at yet."""
    return variable._cache.value


def is_plain(variable: Any) -> bool:
    """Whether a variable is a Python constant, and none that holds others."""
    return isinstance(variable, ConstantVariable)


def is_text(variable: Any) -> bool:
    """Whether a variable is a text made of what the graph computes."""
    return isinstance(variable, StringFormatVariable)


def say_behind_graph(root: Any, said: Callable[..., None], numbers: list[Any]) -> None:
    """Have `said(*numbers)` called where the graph of the outermost translator ends."""
    name = root.output.install_global_by_id("__deq_compile_said", said)
    root.debug_locals.append((DebuggingVariable(said, source=GlobalSource(name)), numbers))


@contextlib.contextmanager
def at_top_of_graph(tx: Any) -> Iterator[None]:
    """What is added to the graph comes right behind its inputs, in the mode of gradients in which the graph begins."""
    graph = tx.output.graph
    first = next((node for node in graph.nodes if node.op not in ("placeholder", "get_attr")), None)
    _, begins = tx.output.tracing_context.global_context.global_state["grad_enabled"]
    place = contextlib.nullcontext() if first is None else graph.inserting_before(first)
    with place, torch.set_grad_enabled(begins):
        yield


def call_operator(tx: Any, operator: Any, tensors: Sequence[Any], name: str, count: int) -> list[Any]:
    """The variables of what `operator(tensors, name)` returns, a list of `count` tensors."""
    proxies = [variable.as_proxy() for variable in tensors]
    made = wrap_fx_proxy(tx, tx.output.create_proxy("call_function", operator, (proxies, name), {}))
    return items_of(tx, made)[:count]


def source_of(variable: Any) -> Any:
    """Where the value of a variable comes from; None for one that the frame has made."""
    return getattr(variable, "source", None)


def is_of_module(source: Any) -> bool:
    """Whether a source is an attribute of a module, whose integers Dynamo does not expect to change."""
    kind = source.guard_source  # by the module, and by what wraps it
    return bool(kind.is_unspecialized_nn_module() or kind.is_unspecialized_builtin_nn_module() or kind.is_specialized_nn_module())


@contextlib.contextmanager
def integers_of_modules() -> Iterator[None]:
    """Take an integer of a module as any other: for a symbol, from its second value on."""
    with config.patch(allow_unspec_int_on_nn_module=True):
        yield


def outermost(tx: Any) -> Any:
    """The translator of the frame that is compiled."""
    *_, found = frames(tx)
    return found


def frames(tx: Any) -> Iterator[Any]:
    """The translators of the frame at work and of those that called it."""
    while tx is not None:
        yield tx
        tx = tx.parent


def removed_handle() -> Any:
    """The variable of a hook's handle after `handle.remove()`."""
    return RemovableHandleVariable(mutation_type=ValueMutationNew(), idx=RemovableHandleVariable.REMOVED)


def leave_out_of_packages(reason: str) -> None:
    """Have torch compile the frame at work anew in the process that loads a precompiled package: it says so, with the reason.

    Raises:
        TorchDynamoException: the user has asked for an error there (`strict_precompile`).
    """
    tx = current()
    if tx is not None and hasattr(tx.output, "bypass_package"):
        tx.output.bypass_package(reason)


def must_be_whole(tx: Any) -> bool:
    """Whether the user has asked for an error in place of a graph break."""
    return bool(tx.one_graph or getattr(tx, "error_on_graph_break", False))


def current() -> Any:
    """The outermost translator at work in this thread; None outside of Dynamo."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None
