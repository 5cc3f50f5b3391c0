"""Which decorator's options hold for a node of an outer graph.

A decorated class, module or function inside an outer `torch.compile(backend="deq")` is traced through; its options hold
for its own regions. Dynamo says of every node which modules it was called in; functions mark their nodes themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import fx

from .config import Options

ANNOTATION = "deq_compile"
CLASS_ATTRIBUTE = "_deq_compile_options"

_modules: weakref.WeakKeyDictionary[torch.nn.Module, Options] = weakref.WeakKeyDictionary()
_functions: weakref.WeakValueDictionary[str, Options] = weakref.WeakValueDictionary()


def remember_module(module: torch.nn.Module, options: Options) -> None:
    _modules[module] = options


def remember_function(options: Options) -> tuple[str, Options]:
    """A mark for a function's nodes: a plain string, since it travels through Dynamo, and the same for equal options in every
    process. It means something as long as the function holds the options that are returned with it."""
    mark = options.key()
    return mark, _functions.setdefault(mark, options)


def scoped_options(nodes: Sequence[fx.Node], outer: Options) -> Options:
    """The outer options with those of every decorator that all of `nodes` were called in, outermost first."""
    by_id = {id(module): options for module, options in _modules.items()}
    chains = [_decorators(node, by_id) for node in nodes if node.op != "placeholder" and node.meta.get("stack_trace")]
    merged = outer
    for level in zip(*chains, strict=False):
        if any(options is not level[0] for options in level):
            break
        merged = merged.merge(level[0])
    return merged


def _decorators(node: fx.Node, by_id: dict[int, Options]) -> list[Options]:
    found = []
    for key, (_, cls) in (node.meta.get("nn_module_stack") or {}).items():
        number = str(key).partition("@")[0]
        options = by_id.get(int(number)) if number.isdigit() else None
        options = options or getattr(cls, CLASS_ATTRIBUTE, None)
        if options is not None:
            found.append(options)
    mark = (node.meta.get("custom") or {}).get(ANNOTATION)
    options = _functions.get(mark) if mark is not None else None
    if options is not None:
        found.append(options)
    return found
