"""Switch capture on: every feature that reaches into Dynamo's private parts, each after a self-test of its own.

On a torch whose Dynamo has changed, a feature that fails its test stays off, `explain` says so, and everything else works.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator

import torch

from deq_compile import markers
from deq_compile.torch_parts import MISSING, NEEDED, REGIONS, counters

from . import (
    allclose,
    bars,
    calls,
    counted,
    ddp,
    declared_calls,
    dynamo,
    functions,
    growing,
    hooks,
    loop_exit,
    proven,
    roomy,
    said,
    self_tests,
    sharded,
    solver_calls,
    sparse,
    torchdeq,
)

log = logging.getLogger("deq_compile.capture")

OFF: dict[str, str] = {}  # feature -> why it is off
EVERYTHING = REGIONS  # the feature without which no graph is rewritten
_installed = False


def install() -> None:
    """Once, when a backend of ours is first looked up: before Dynamo traces for it."""
    global _installed
    if _installed:
        return
    _installed = True
    for call in markers.CALLS:
        torch.compiler.allow_in_graph(call)
    nothing = _absent(NEEDED)
    if nothing:
        OFF[EVERYTHING] = nothing
    else:
        declared_calls.install()
    note = proven.note()
    passed_before = note is not None and note.is_file()
    for feature in _FEATURES:
        absent = nothing or _absent((*_TESTED, *feature.needs))
        if absent:
            OFF[feature.name] = absent
        else:
            _try(feature.name, feature.switch_on, _pass if passed_before else feature.test)
    if note is not None and not OFF and dynamo.current() is None:
        proven.keep(note)


def _pass() -> None:
    """The self-test of a feature that has passed its own before."""


def features() -> list[str]:
    """The names of all features, whether on or off."""
    return [feature.name for feature in _FEATURES]


def _absent(names: Iterable[str]) -> str:
    """Why the first of some names that is missing is; "" where all are there."""
    return next((MISSING[name] for name in names if name in MISSING), "")


def _try(feature: str, switch_on: Callable[[], Callable[[], None]], test: Callable[[], None]) -> None:
    remove: Callable[[], None] = lambda: None  # noqa: E731
    try:
        remove = switch_on()
        if dynamo.current() is None:  # inside a trace there is no tracing
            with _unseen():
                test()
    except Exception as error:  # whatever a changed Dynamo may raise
        remove()
        OFF[feature] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        log.warning("%s is off on torch %s: %s", feature, torch.__version__, OFF[feature])


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Leave no trace in the counters that users look at, nor in the packages that torch makes of what is compiled; and do not
    mind what modes of autograd the first call came under."""
    before = copy.deepcopy(counters)
    packages: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if hasattr(dynamo.config, "caching_precompile"):
        packages = dynamo.config.patch(caching_precompile=False)
    try:
        with packages, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        counters.clear()
        counters.update(before)


@dataclasses.dataclass(frozen=True)
class _Feature:
    """switch_on patches and returns what undoes that; `test` fails where the patch does not do its work; `needs` are the names
    of Dynamo's without which the feature would be wrong, or could not be taken back."""

    name: str
    switch_on: Callable[[], Callable[[], None]]
    test: Callable[[], None]
    needs: tuple[str, ...] = ()


# Without it no feature could be tested.
_TESTED = ("reset_code",)
# To mark a region, to see what its body changes, and to have a frame traced again where a mark was in vain.
_MARKS = (
    "InstructionTranslator", "TorchDynamoException", "TensorifyScalarRestartAnalysis", "VariableTracker", "TensorVariable",
    "SymNodeVariable", "CellVariable", "LazyVariableTracker", "AttributeMutationExisting",
)  # fmt: skip
_CALLS = (*_MARKS, "UserFunctionVariable")
_LOOPS = (
    *_MARKS, "InliningInstructionTranslator", "InliningGeneratorInstructionTranslator", "livevars_analysis",
    "RangeIteratorVariable", "config",
)  # fmt: skip
_HOOKS = (*_CALLS, "RemovableHandleVariable", "ValueMutationNew", "wrap_fx_proxy")
_FUNCTIONS = (*_HOOKS, "AutogradFunctionVariable")

_SAID = (*_LOOPS, "UserFunctionVariable", "ConstantVariable", "DebuggingVariable", "StringFormatVariable", "GlobalSource")

_SPARSE = (
    *_CALLS, "InliningInstructionTranslator", "InliningGeneratorInstructionTranslator", "VariableBuilder", "AttrSource",
    "WeakTensorKeyDictionary",
)  # fmt: skip

_FEATURES = [
    _Feature("room for the frames of a trace", roomy.install, lambda: None, ("InstructionTranslator",)),
    _Feature("loops whose exit depends on data", loop_exit.install, self_tests.test_loop_exit, _LOOPS),
    _Feature(
        "loops whose count is an input",
        counted.install,
        self_tests.test_counted,
        (*_LOOPS, "UserFunctionVariable", "VariableBuilder", "wrap_fx_proxy", "RestartAnalysis"),
    ),
    _Feature("calls of solvers", calls.install, self_tests.test_calls, _CALLS),
    _Feature("calls of solvers that are known by their looks", solver_calls.install, lambda: None, _CALLS),
    _Feature("TorchDEQ", torchdeq.install, self_tests.test_torchdeq, _CALLS),
    _Feature("backward hooks", hooks.install, self_tests.test_hooks, _HOOKS),
    _Feature("implicit gradients in autograd functions", functions.install, self_tests.test_functions, _FUNCTIONS),
    _Feature(
        "torch.allclose as a loop's test", allclose.install, self_tests.test_allclose, (*_LOOPS, "TorchInGraphFunctionVariable")
    ),
    _Feature("numbers that grow from call to call", growing.install, self_tests.test_growing, (*_LOOPS, "graph_break")),
    _Feature("what a loop prints", said.install, self_tests.test_said, _SAID),
    _Feature("progress bars", bars.install, lambda: None, _LOOPS),
    _Feature("sparse matrices", sparse.install, self_tests.test_sparse, _SPARSE),
    _Feature("modules that FSDP2 shards", sharded.install, lambda: None, (*_CALLS, "wrap_fx_proxy")),
    _Feature("whole graphs under DistributedDataParallel", ddp.install, lambda: None, ("DDPOptimizer",)),
]
