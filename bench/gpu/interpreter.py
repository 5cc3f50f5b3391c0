"""Triton's interpreter without what it does over and over, and that changes nothing.

At every launch, and every call of a device function, it looks through all of triton.language for builtins to patch. It computes
sums and products of integers a second time in 64 bits, to assert that none overflows; without its debug option, which nothing
sets here, the assertion is left out after that work. And of the few shapes of a kernel it makes thousands of types, each checked.
Together they were more than half of the CPU time of interpreted launches.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """What of the language the patch for this function touches: it looks at the modules that its globals name."""
    found = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(module.__name__ for module in found if module in (tl, tl.core))


def quicken() -> None:
    """Patch the language once; make a type of a shape once; leave out the check of integers whose outcome is not looked at.
    For one process, for good."""
    _patch_once()
    _remember_types()
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once() -> None:
    patch, patched = interpreter._patch_lang, set[frozenset[str]]()
    stays = SimpleNamespace(restore=lambda: None)

    def patch_once(function: Any) -> Any:
        key = _languages(function)
        if key not in patched:
            patch(function)
            patched.add(key)
        return stays

    interpreter._patch_lang = patch_once


def _remember_types() -> None:
    """What the makers of a block type and of a tensor find out about a shape, and the type of numpy for one of Triton's."""
    make_type, make_tensor, numpy_type = tl.core.block_type.__init__, tl.core.tensor.__init__, interpreter._get_np_dtype
    of_type: dict[tuple[Any, ...], tuple[dict[str, Any], str]] = {}
    of_tensor: dict[tuple[Any, ...], dict[str, Any]] = {}
    of_numpy: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([getattr(size, "value", size) for size in shape])
        found = of_type.get(key)
        if found is None:
            make_type(self, element_ty, shape)
            own = {name: value for name, value in vars(self).items() if name not in ("element_ty", "name")}
            of_type[key] = own, self.name.removesuffix(f"{element_ty}>")
        else:
            self.__dict__.update(found[0], element_ty=element_ty, name=f"{found[1]}{element_ty}>")

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        found = of_tensor.get(key)
        if found is None:
            make_tensor(self, handle, type)
            of_tensor[key] = {name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")}
        else:
            self.__dict__.update(found, handle=handle, type=type, dtype=type.scalar)

    def np_dtype(type: Any) -> Any:
        found = of_numpy.get(type.name)
        if found is None:
            found = of_numpy[type.name] = numpy_type(type)
        return found

    tl.core.block_type.__init__, tl.core.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, np_dtype
