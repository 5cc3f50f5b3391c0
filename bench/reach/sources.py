"""The folder of clones: what is missing from it, and how a model's own modules are imported from it, unmodified."""

from __future__ import annotations

import ast
import contextlib
import importlib
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .manifest import Model


def commit_of(folder: Path) -> str:
    """The commit of a clone; empty where the folder is none."""
    if not (folder / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def changed(folder: Path) -> list[str]:
    """Python files that differ from the commit."""
    command = ["git", "-C", str(folder), "diff", "--name-only", "HEAD", "--", "*.py"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def clone_command(model: Model, folder: Path) -> str:
    where = folder / model.folder
    return f"git clone https://github.com/{model.repository} {where} && git -C {where} checkout -q {model.commit}"


def problem(model: Model, folder: Path) -> str:
    """What keeps a model from running: expected, got, fix. Empty where its code is there, at its commit, as it was published."""
    if model.package:
        try:
            metadata.version(model.package)
        except metadata.PackageNotFoundError:
            return f"{model.name}: expected the package {model.package}, got none. Fix: pip install {model.package}"
        return ""
    where = folder / model.folder
    found = commit_of(where)
    if found != model.commit:
        got = f"commit {found}" if found else "no clone"
        return f"{model.name}: expected {where} at {model.commit}, got {got}. Fix: {clone_command(model, folder)}"
    if files := changed(where):
        got = f"changes in {files[0]} and {len(files) - 1} others"
        return f"{model.name}: expected {where} as it was published, got {got}. Fix: git -C {where} checkout -q -f HEAD"
    return ""


def missing(models: Iterable[Model], folder: Path) -> list[str]:
    """What has to be fetched before these models can run."""
    return [text for text in (problem(model, folder) for model in models) if text]


def enter(model: Model, folder: Path) -> None:
    """Put the model's own folders first on `sys.path`, so that a driver can import from them."""
    if not model.package:
        sys.path[:0] = [str(folder / model.folder / inner) for inner in model.path]


def definitions(path: str, names: Sequence[str] = ()) -> types.ModuleType:
    """A script as a module of its imports, classes and functions alone: what it would run when imported is left out.

    The lines and the file name are the author's, so that a report names them. `path` is looked for on `sys.path`;
    `names` are assignments at the top that the definitions need.
    """
    file = next((Path(base) / path for base in sys.path if (Path(base) / path).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"expected {path} in a folder of sys.path")
    tree = ast.parse(file.read_text(), str(file))

    def wanted(node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            return any(isinstance(target, ast.Name) and target.id in names for target in node.targets)
        return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)

    tree.body = [node for node in tree.body if wanted(node)]
    module = types.ModuleType(file.stem)
    module.__file__ = str(file)
    sys.modules[file.stem] = module
    exec(compile(tree, str(file), "exec"), module.__dict__)
    return module


def absent(*names: str) -> None:
    """Stand-ins for packages that a file imports and its model does not use (plots, data sets, loggers)."""

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **kwargs: None

    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
            continue
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = Anything(".".join(parts[:depth]))
            module.__path__ = []  # a package: what is inside of it is asked for by name
            sys.modules[module.__name__] = module


def restore_old_names() -> None:
    """Names that numpy 2 and torch 2 have dropped and old repositories call, with the meaning they had; CUDA calls that wait."""
    vars(np).setdefault("Inf", np.inf)
    vars(torch)["solve"] = lambda right, matrix: (torch.linalg.solve(matrix, right), None)
    if not torch.cuda.is_available():
        vars(torch.cuda)["synchronize"] = lambda device=None: None


@contextlib.contextmanager
def cuda_named() -> Iterator[None]:
    """For code that reads `torch.version.cuda` when it is imported, on a torch without CUDA."""
    before = torch.version.cuda
    torch.version.cuda = before or "12.0"
    try:
        yield
    finally:
        torch.version.cuda = before
