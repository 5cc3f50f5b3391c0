"""The hash of Triton that Inductor makes in every process.

It is of a library of half a gigabyte, which takes as long as a small model's trace, and part of a key only where there is a GPU.
So it is kept in this user's own folder under the sizes and times of Triton's files, and given to Inductor where these are still
the same. (The hash of torch itself is of two thousand files, of which one that is edited has to make another key: that is left
alone.)
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
    """Give Inductor the hash that an earlier process has kept. Never raises."""
    global _missing
    function = _hash()
    if function is None:
        return
    try:
        file = folder.private() / f"deq_compile_triton_{_of_files()}"
    except OSError as error:
        log.info("no hash from earlier processes: %s", error)
        return
    known = _kept(file)
    if known is None:
        _missing = file
        return
    with contextlib.suppress(Exception):  # it has one already
        function.set(known)


def _kept(file: Path) -> str | None:
    """What stands in a file; None where it is none of ours."""
    try:
        known = json.loads(file.read_text())["triton"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return known if isinstance(known, str) and known else None


def keep() -> None:
    """Note it for later processes, once Inductor has made it. Never raises."""
    global _missing
    file, _missing = _missing, None
    function = _hash()
    if file is None or function is None:
        return
    try:
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.touch(mode=0o600)
        part.write_text(json.dumps({"triton": function()}))
        part.replace(file)
    except Exception as error:
        log.info("the hash of Triton is not kept: %s", error)


def _hash() -> Any:
    """The function of no argument that makes it, and for which it can be set; None where there is none, or no Triton."""
    from deq_compile.torch_parts import hash_of_triton

    return hash_of_triton if hasattr(hash_of_triton, "set") and importlib.util.find_spec("triton") is not None else None


def _of_files() -> str:
    """A hash of what it depends on: versions, and the sizes and times of Triton's files."""
    told = [torch.__version__, str(torch.version.git_version), sys.version]
    for file in sorted(_files()):
        facts = file.stat()
        told.append(f"{file} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _files() -> Iterator[Path]:
    triton = importlib.util.find_spec("triton")
    for where in (triton.submodule_search_locations or ()) if triton is not None else ():
        yield from Path(where).rglob("*.py")
        yield from Path(where, "_C").glob("libtriton*.so")
