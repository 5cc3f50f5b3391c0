"""Tiles that were measured to be better than the table's on this machine, from a file that tuning writes.

Nothing is tuned while a model runs: a first call never waits for it, and sums change their order only when somebody asks for it
(`python -m bench gpu --tune`). The file is DEQ_COMPILE_TILES, by default ~/.cache/deq_compile/tiles.json: a JSON object of
{"B x D x steps x element size": {field of Tiles: value}}; a file that cannot be read counts as empty, and is told in the log.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tiles import Tiles

log = logging.getLogger("deq_compile.kernels")
_override: dict[str, dict[str, int]] | None = None


def path() -> Path:
    return Path(os.environ.get("DEQ_COMPILE_TILES", "~/.cache/deq_compile/tiles.json")).expanduser()


def key(B: int, D: int, steps: int, element_size: int) -> str:
    return f"{B} x {D} x {steps} x {element_size}"


@functools.cache
def _read() -> dict[str, dict[str, int]]:
    file = path()
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, got {type(found).__name__}")
        return found
    except (OSError, ValueError) as error:
        log.warning("tuned tiles are ignored: %s: %s", file, error)
        return {}


@functools.cache
def lookup(B: int, D: int, steps: int, element_size: int) -> Tiles | None:
    """The tuned tiles for a shape, if there are any that fit it."""
    from .tiles import Tiles, by_shape

    values = (_read() if _override is None else _override).get(key(B, D, steps, element_size))
    if values is None:
        return None
    plain = by_shape(B, D, steps, element_size)
    try:
        found = Tiles(**values)
    except TypeError as error:
        log.warning("tuned tiles for %s are ignored: %s", key(B, D, steps, element_size), error)
        return None
    fits = found.BM == plain.BM and found.slabs * found.slab >= D > (found.slabs - 1) * found.slab
    return found if fits and (found.slabs == 1 or found.slab % 16 == 0) else None


def save(found: dict[str, dict[str, int]]) -> Path:
    """Add tuned tiles to the file; those of other shapes stay."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    _read.cache_clear()
    merged = {**_read(), **found}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    temporary.replace(file)
    forget()
    return file


@contextlib.contextmanager
def using(found: dict[str, dict[str, int]]) -> Iterator[None]:
    """Inside: these, whatever the file says. For tuning itself."""
    global _override
    before, _override = _override, found
    lookup.cache_clear()
    try:
        yield
    finally:
        _override = before
        lookup.cache_clear()


def forget() -> None:
    """Read the file again at the next look-up."""
    _read.cache_clear()
    lookup.cache_clear()
