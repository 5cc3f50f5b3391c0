"""The backend for everything that is no region, and what this machine can run of it."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .config import Config
from .kernels import ahead
from .kernels.folder import distrusted

log = logging.getLogger("deq_compile.inner")

CompiledFn = Callable[..., Any]


def usable(config: Config, values: Sequence[Any]) -> Config:
    """The configuration with an inner backend that this machine can run."""
    on_cpu = any(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in values)
    if config.inner == "inductor" and on_cpu and not has_cpp_compiler():
        return config.replace(inner="aot_eager")
    return config


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler; says so once where it does not."""
    reason = no_cpp_compiler()
    if reason:
        warnings.warn(
            f"no C++ compiler was found, so Inductor cannot compile for the CPU: the 'deq' backend goes on with "
            f"inner='aot_eager'. {reason}",
            UserWarning,
            stacklevel=2,
        )
    return not reason


def no_cpp_compiler() -> str:
    """What to do where Inductor finds no C++ compiler; "" where it finds one."""
    from .torch_parts import InvalidCxxCompiler, get_cpp_compiler

    prompt = "start from a developer prompt of Visual Studio's C++ build tools, or set CXX"
    fix = {"win32": prompt, "darwin": "xcode-select --install, or set CXX"}
    wanted = f"Fix: {fix.get(sys.platform, 'install g++ or clang++, or set CXX')}"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return wanted
    except RuntimeError as error:  # one that Inductor does not use, such as Visual Studio's in another language than English
        return f"Inductor says: {(str(error).splitlines() or [''])[0]} {wanted}"
    return ""


@functools.cache
def say_whose_cache() -> None:
    """Inductor runs the code that it finds in its cache, whoever put it there: said once where that may be somebody else."""
    from .torch_parts import inductor_cache_dir

    if reason := distrusted(Path(inductor_cache_dir())):
        log.warning("Inductor runs what it finds in its cache, and %s. Fix: set TORCHINDUCTOR_CACHE_DIR", reason)


def compile_rest(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, mode: str | None) -> CompiledFn:
    """Hand a graph to the inner backend."""
    inputs = list(example_inputs)
    inner = usable(config, inputs).inner
    if inner == "eager":
        return gm.forward
    from .torch_parts import aot_eager, compile_fx, list_mode_options

    if inner == "aot_eager" or compile_fx is None:
        return aot_eager(gm, inputs) if aot_eager is not None else gm.forward
    say_whose_cache()
    ahead.wait_for_look()
    patches = {**(list_mode_options(mode) if mode else {}), **config.inductor}
    compiled: CompiledFn = compile_fx(gm, inputs, config_patches=patches or None)
    return compiled
