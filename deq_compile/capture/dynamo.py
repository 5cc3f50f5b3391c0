"""The one place that names Dynamo's private parts (torch 2.11 to 2.13). Everything is `Any`: none of it is a promise.

On a torch where one of these names is gone, `MISSING` says which, and capture stays off.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

MISSING: list[str] = []


def _find(module: str, name: str, otherwise: Any = None) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        MISSING.append(str(error))
        return otherwise


config = _find("torch._dynamo", "config")
reset_code = _find("torch._dynamo", "reset_code")
InstructionTranslator = _find("torch._dynamo.symbolic_convert", "InstructionTranslator")
InliningInstructionTranslator = _find("torch._dynamo.symbolic_convert", "InliningInstructionTranslator")
InliningGeneratorInstructionTranslator = _find("torch._dynamo.symbolic_convert", "InliningGeneratorInstructionTranslator")
livevars_analysis = _find("torch._dynamo.bytecode_analysis", "livevars_analysis")
VariableTracker = _find("torch._dynamo.variables.base", "VariableTracker")
CellVariable = _find("torch._dynamo.variables", "CellVariable")
LazyVariableTracker = _find("torch._dynamo.variables", "LazyVariableTracker")
SymNodeVariable = _find("torch._dynamo.variables", "SymNodeVariable")
TensorVariable = _find("torch._dynamo.variables", "TensorVariable")
TorchInGraphFunctionVariable = _find("torch._dynamo.variables", "TorchInGraphFunctionVariable")
UserFunctionVariable = _find("torch._dynamo.variables", "UserFunctionVariable")
AutogradFunctionVariable = _find("torch._dynamo.variables", "AutogradFunctionVariable")
RangeIteratorVariable = _find("torch._dynamo.variables.lists", "RangeIteratorVariable")
RemovableHandleVariable = _find("torch._dynamo.variables", "RemovableHandleVariable")
ValueMutationNew = _find("torch._dynamo.variables.base", "ValueMutationNew")
wrap_fx_proxy = _find("torch._dynamo.variables.builder", "wrap_fx_proxy")
AttributeMutationExisting = _find("torch._dynamo.variables.base", "AttributeMutationExisting")
# the one exception by which a backend can have a frame traced again
RestartFromBackend = _find("torch._dynamo.exc", "TensorifyScalarRestartAnalysis", RuntimeError)


def translators() -> list[Any]:
    """The classes that trace frames, those that share a table of handlers once."""
    classes = [InstructionTranslator, InliningInstructionTranslator, InliningGeneratorInstructionTranslator]
    return list({id(cls.dispatch_table): cls for cls in classes}.values())


def build(tx: Any, value: Any) -> Any:
    """Dynamo's variable for a Python value."""
    return VariableTracker.build(tx, value)


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


def removed_handle() -> Any:
    """The variable of a hook's handle after `handle.remove()`."""
    return RemovableHandleVariable(mutation_type=ValueMutationNew(), idx=RemovableHandleVariable.REMOVED)


def current() -> Any:
    """The outermost translator at work in this thread; None outside of Dynamo."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None
