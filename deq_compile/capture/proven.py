"""Self-tests of capture that have been passed before need not be run again: a second at the start of every process.

They show that Dynamo is what our patches take it for. So what has been passed stands for processes that have the same torch, the
same Dynamo (files of the same sizes and times) and the same package, as long as nobody else has changed a method of Dynamo's.
DEQ_COMPILE_SELF_TESTS=1 runs them whatever was passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import torch

from deq_compile.kernels.folder import private
from deq_compile.torch_parts import MISSING

VARIABLE = "DEQ_COMPILE_SELF_TESTS"
_TORCH, _PYTHON, _INSTALLED = os.path.join(os.path.dirname(torch.__file__), ""), os.path.dirname(os.__file__), "site-packages"
_IMPORTED = ("functorch", "numpy", "optree", "sympy", "torch", "torchgen", "tqdm", "triton", "typing_extensions")  # by Dynamo


def note() -> Path | None:
    """The file that stands for having passed, to be asked for before a patch of ours is in place; it is empty. None where what
    was passed is not asked for, or could not be kept."""
    if os.environ.get(VARIABLE) == "1" or _changed():
        return None
    dynamo, ours = Path(inspect.getfile(sys.modules["torch._dynamo"])).parent, Path(__file__).resolve().parents[1]
    told = [torch.__version__, torch.version.git_version, sys.version, *sorted(MISSING)]
    try:
        for folder in (dynamo, ours):
            for file in sorted(folder.rglob("*.py")):
                facts = file.stat()
                told.append(f"{file} {facts.st_size} {facts.st_mtime_ns}")
        return private() / f"deq_compile_capture_{hashlib.sha256(repr(told).encode()).hexdigest()[:32]}"
    except OSError:  # such as: no folder is this user's alone
        return None


def keep(note: Path) -> None:
    """Note that all have just been passed."""
    with contextlib.suppress(OSError):  # else they are run again
        note.touch(mode=0o600)


def _modules() -> list[ModuleType]:
    return [m for name, m in sys.modules.items() if name.startswith("torch._dynamo.") and isinstance(m, ModuleType)]


def _changed() -> bool:
    """Whether a function or a class of Dynamo's, or a method of one, is somebody else's."""
    modules = _modules()
    values = [value for m in modules for value in list(vars(m).values()) if isinstance(value, type | FunctionType)]
    if not all(_is_known(str(value.__module__).partition(".")[0]) for value in values):
        return True
    return not all(_is_torchs(function) for module in modules for function in _functions(module))


def _is_torchs(function: FunctionType) -> bool:
    """Whether a function is torch's, or what the standard library makes for torch: a dataclass's methods, a wrapper."""
    file = function.__code__.co_filename
    if file == "<string>":
        return function.__name__.startswith("__")
    return file.startswith(_TORCH) or (file.startswith(_PYTHON) and _INSTALLED not in file)


def _is_known(package: str) -> bool:
    return package in sys.stdlib_module_names or package in _IMPORTED


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """The functions of a module, and the methods of its classes."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) == module.__name__:
            for found in (value, *vars(value).values()) if isinstance(value, type) else (value,):
                function = getattr(found, "__func__", found)
                if isinstance(function, FunctionType):
                    yield function
