"""Two hashes that Inductor makes in every process, of files that hardly ever change: of its own, and of Triton's.

The latter is of a library of half a gigabyte, which takes as long as a small model's trace. So they are kept in this user's own
folder under the sizes and times of those files, and given to Inductor where these are still the same. Where there is an
accelerator, whose code is looked up by the hash of Triton, nothing is.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import folder

log = logging.getLogger("deq_compile.kernels")

_missing: Path | None = None  # the file that `keep` is to write


def recall() -> None:
    """Give Inductor the hashes that an earlier process has kept. Never raises."""
    global _missing
    hashes = _hashes()
    try:
        file = folder.private() / f"deq_compile_hashes_{_of_files()}"
    except OSError as error:
        log.info("no hashes from earlier processes: %s", error)
        return
    known = _kept(file)
    if set(known) != set(hashes):
        _missing = file
        return
    for name, function in hashes.items():
        with contextlib.suppress(Exception):  # it has one already
            function.set(known[name])


def _kept(file: Path) -> dict[str, bytes | str | None]:
    """What stands in a file; nothing where it is none of ours."""
    try:
        return {name: _read(value) for name, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep() -> None:
    """Note them for later processes, once Inductor has made them. Never raises."""
    global _missing
    file, _missing = _missing, None
    if file is None:
        return
    try:
        values = {name: _written(function()) for name, function in _hashes().items()}
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.touch(mode=0o600)
        part.write_text(json.dumps(values))
        part.replace(file)
    except Exception as error:
        log.info("hashes are not kept: %s", error)


def _hashes() -> dict[str, Any]:
    """Functions of no argument that a value can be set for."""
    from deq_compile.torch_parts import hash_of_inductor, hash_of_triton

    found = {"inductor": hash_of_inductor, "triton": hash_of_triton}
    return {name: function for name, function in found.items() if hasattr(function, "set")}


def _of_files() -> str:
    """A hash of what the hashes depend on: versions, and the sizes and times of all files."""
    told = [torch.__version__, str(torch.version.git_version), sys.version]
    for file in sorted(_files()):
        facts = file.stat()
        told.append(f"{file} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _files() -> Iterator[Path]:
    inductor = Path(torch.__file__).parent / "_inductor"
    yield from (file for file in inductor.rglob("*") if file.suffix in (".py", ".cpp", ".ld"))
    triton = importlib.util.find_spec("triton")
    for where in (triton.submodule_search_locations or ()) if triton is not None else ():
        yield from Path(where).rglob("*.py")
        yield from Path(where, "_C").glob("libtriton*")


def _written(value: bytes | str | None) -> list[str] | None:
    return None if value is None else ["bytes", value.hex()] if isinstance(value, bytes) else ["str", value]


def _read(value: list[str] | None) -> bytes | str | None:
    if value is None:
        return None
    kind, text = value
    return bytes.fromhex(text) if kind == "bytes" else text
