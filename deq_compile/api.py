"""The ways in: `@deq_compile` and `explain`."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import nn

from . import scope
from .backend import Backend
from .capture import OFF
from .config import Options
from .exporting import exportable, exporting, traced
from .onlooker import Onlooker, original_of
from .report import Report
from .torch_parts import COMPILED_CALL, annotate, call_of, counters, dynamo_config, lost

T = TypeVar("T", bound=Callable[..., Any])


@overload
def deq_compile(target: T, /, **options: Any) -> T: ...
@overload
def deq_compile(target: None = None, /, **options: Any) -> Callable[[T], T]: ...
def deq_compile(target: Any = None, /, **options: Any) -> Any:
    """Compile a model's fixed-point regions: on a Module class, a Module, or a function.

    A class stays the same class: its instances compile themselves at their first call, subclasses inherit that, and
    state_dict keys, pickling and deepcopy are as before. A module is compiled in place (as `nn.Module.compile`) and
    returned. A function comes back wrapped. Inside an outer `torch.compile(backend="deq")` all three are traced through,
    and their options hold for their own regions.

    Args:
        target: what to compile; None for the decorator with options, `@deq_compile(tol=1e-5)`.
        options: see `deq_compile.config.Options`.

    Raises:
        ValueError: an unknown option or a bad value, at once.
        TypeError: a target that is none of the three, or TorchScript.
    """
    chosen = Options.from_options(options)
    if target is None:
        return functools.partial(_decorate, options=chosen)
    return _decorate(target, chosen)


def _decorate(target: Any, options: Options) -> Any:
    if isinstance(target, type) and issubclass(target, nn.Module):
        setattr(target, scope.CLASS_ATTRIBUTE, options)
        setattr(target, COMPILED_CALL, _CompiledCall(options))
        return target
    _refuse_script(target, "deq_compile")
    if isinstance(target, nn.Module):
        scope.remember_module(target, options)
        target.compile(backend=Backend(options))
        setattr(target, COMPILED_CALL, exportable(getattr(target, COMPILED_CALL), call_of(target), options, target))
        return target
    if callable(target) and not isinstance(target, type):
        return _compile_function(target, options)
    raise TypeError(
        f"deq_compile: expected an nn.Module class, an nn.Module or a function, got {target!r}. "
        "Options are keywords: @deq_compile(tol=1e-5)"
    )


def _refuse_script(target: Any, who: str) -> None:
    if isinstance(target, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError(
            f"{who}: expected an nn.Module or a function that Dynamo can trace, got TorchScript ({type(target).__name__}). "
            "Fix: the eager module or function that it was made of"
        )


class _CompiledCall:
    """What `nn.Module.__call__` looks up on an instance. The first look-up compiles, and leaves the result in the
    instance under the same name, where `nn.Module.__getstate__` drops it from pickles and copies."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return None
        call = call_of(module)
        if exporting():
            return traced(call, self.options, module)
        if torch.compiler.is_compiling():
            return None
        compiled = exportable(torch.compile(call, backend=Backend(self.options)), call, self.options, module)
        module.__dict__[COMPILED_CALL] = compiled
        return compiled


def _compile_function(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    name, options = scope.remember_function(options)
    mark = {scope.ANNOTATION: name}

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with annotate(mark):
            return function(*args, **kwargs)

    return functools.wraps(function)(exportable(torch.compile(marked, backend=Backend(options)), marked, options))


def _many_compilations() -> contextlib.AbstractContextManager[Any]:
    if dynamo_config is None:
        return contextlib.nullcontext()
    no_limit: contextlib.AbstractContextManager[Any] = dynamo_config.patch(
        recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30
    )
    return no_limit


def explain(model: Callable[..., Any], /, **options: Any) -> Callable[..., Report]:
    """What the compiler finds in a model: `report = explain(model, **options)(*inputs)`.

    Compiles and runs one forward, in the gradient mode of the caller. `report.regions` holds the regions with their
    status (solve or kept, decided by this very call), `report.skipped` every candidate that was left alone with a Reason
    and the user's file and line, and the functions with a loop that no compiler saw; `str(report)` is a table,
    `report.to_json()` JSON. Of a model that is compiled already, what it was made of is explained, with the options it was
    compiled with.

    Raises:
        TypeError: a class, a TorchScript module or function, or what cannot be called.
        ValueError: an unknown option or a bad value.
    """
    chosen = Options.from_options(options)
    if isinstance(model, type):
        name = model.__name__
        raise TypeError(f"explain: expected a model, got the class {name}. Fix: explain({name}(...))(*inputs)")
    _refuse_script(model, "explain")
    if not callable(model):
        raise TypeError(f"explain: expected an nn.Module or a function, got {model!r}. Fix: explain(model)(*inputs)")
    original, said = original_of(model)

    def run(*args: Any, **kwargs: Any) -> Report:
        report = Report()
        inherited = Options()
        if isinstance(original, nn.Module):
            inherited = getattr(type(original), scope.CLASS_ATTRIBUTE, inherited)
        backend = Backend(inherited.merge(Options.from_options(said)).merge(chosen), report, votes=False)
        # a decorated module would run its own compiled call: explain what it calls
        call = call_of(original) if isinstance(original, nn.Module) else original
        # each explanation is one more compilation of the same code, which is no sign of a model that recompiles
        before = Counter(counters["graph_break"])
        compiled = torch.compile(call, backend=backend)
        with _many_compilations(), Onlooker() as onlooker:
            compiled(*args, **kwargs)
        backend.tell(report)
        report.skipped += onlooker.told(original, report.skipped)
        report.features_off = {**lost(), **OFF}
        report.graph_breaks = list((Counter(counters["graph_break"]) - before).elements())
        return report

    return run
