"""Which loops of the user's ran in Python itself, outside of every graph, while `explain` ran a model; and why.

Dynamo gives a function up where its graph would end inside of a loop, and from then on does not look at it again, for any
backend: nothing of it ever reaches a compiler. What it leaves alone runs as the user's own code object, and so can be seen.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .markers import NOT_THE_USERS, PACKAGE
from .report import Location, Reason, Skipped
from .torch_parts import backend_below, counters, model_below

MOST = 5  # functions that are named
_SOLVER = (os.path.join(PACKAGE, "region"), os.path.join(PACKAGE, "kernels"))
_CALLERS = (
    os.path.join(PACKAGE, "api.py"),
    os.path.join(PACKAGE, "onlooker.py"),
    *(os.path.join(*torch.__path__, *part.split("/")) for part in (
        "nn/", "_dynamo/eval_frame.py", "_dynamo/external_utils.py", "utils/checkpoint.py", "autograd/function.py",
    )),
)  # fmt: skip
_LIBRARY = os.path.dirname(os.__file__)
_AGAIN = "torch._dynamo.reset() has it looked at again"


class Onlooker:
    """While it is entered, notes each function with a loop that Python runs, and each that Dynamo tries to compile.

    Where another profiler is at work nothing is noted.
    """

    def __init__(self) -> None:
        self.ran: dict[types.CodeType, None] = {}
        self.tried: set[Any] = set()
        self.given_up: list[str] = []
        self._before: Counter[str] = Counter()
        self._installed = False
        self._inside = 0

    def __enter__(self) -> Onlooker:  # noqa: PYI034 (typing.Self is Python 3.11's)
        self._before = Counter(counters["unimplemented"])
        if sys.getprofile() is None:
            self._installed = True
            sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            sys.setprofile(None)
        new = Counter(counters["unimplemented"]) - self._before
        self.given_up = [" ".join(text.split("\n", 1)[0].split()) for text in new]

    def _see(self, frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "return"):
            return
        what = _kind(code)
        if what == "compiler":
            self._inside += 1 if event == "call" else -1
            if event == "call" and code.co_name == "_compile":
                self.tried.add(frame.f_locals.get("code"))
        elif what == "loop" and event == "call" and self._inside <= 0 and _calls_models(frame.f_back):
            self.ran[code] = None

    def told(self, model: Any, known: Sequence[Skipped] = ()) -> list[Skipped]:
        """A line for each of them that `known` does not speak of already."""
        sharded = _sharded(model)
        if sharded:  # which says more than where the graph ends
            known = [skipped for skipped in known if skipped.reason is not Reason.BROKEN]
        found: list[Skipped] = []
        for code in [code for code in self.ran if not any(_within(code, skipped.location) for skipped in known)][:MOST]:
            if code in self.tried:
                why = f"Dynamo gave {code.co_name} up: {self.given_up[-1] if self.given_up else 'it does not say why'}"
            else:
                why = (
                    f"Dynamo did not look at {code.co_name}: it stands under torch.compiler.disable, or an earlier compilation "
                    f"in this process, whatever its backend, has given it up; then {_AGAIN}"
                )
            if sharded:
                why += f". FSDP2 gathers the parameters of {sharded} around each of its calls: "
                why += "shard the module that holds the loop"
            found.append(Skipped(Reason.NOT_TRACED, Location(code.co_filename, code.co_firstlineno, code.co_name), why))
        return found


def _within(code: types.CodeType, place: Location) -> bool:
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return place.file == code.co_filename and min(lines) <= place.line <= max(lines)


def _kind(code: types.CodeType) -> str:
    try:
        return _kind_of(code)
    except TypeError:  # code that Dynamo made, with a constant that has no hash
        return ""


@functools.lru_cache(maxsize=65536)
def _kind_of(code: types.CodeType) -> str:
    """ "compiler": what runs below it, or below an import, is no run of the model; "loop": a function of the user's with one."""
    file = code.co_filename
    if file.startswith((*_SOLVER, "<frozen importlib")) or (code.co_name == "_compile" and file.endswith("convert_frame.py")):
        return "compiler"
    return "loop" if _may_be_the_users(code) and _loops(code) else ""


def _calls_models(frame: types.FrameType | None) -> bool:
    """Whether a frame is the user's, or a part of torch that calls the user's functions."""
    if frame is None or _may_be_the_users(frame.f_code):
        return True
    return frame.f_code.co_filename.startswith(_CALLERS)


def _may_be_the_users(code: types.CodeType) -> bool:
    file = code.co_filename
    own = not file.startswith((*NOT_THE_USERS, "<")) and not (file.startswith(_LIBRARY) and "site-packages" not in file)
    return own and not code.co_name.startswith(("<", "torch_dynamo_resume", "__compiled"))


def _loops(code: types.CodeType) -> bool:
    jumps = (i for i in dis.get_instructions(code) if "JUMP" in i.opname)
    return any("JUMP_BACKWARD" in i.opname or (i.opname == "JUMP_ABSOLUTE" and i.argval < i.offset) for i in jumps)


def _sharded(model: Any) -> str:
    """The name of a part of a model that FSDP2 shards by itself."""
    if not isinstance(model, nn.Module):
        return ""
    parts = ((name, part) for name, part in model.named_modules() if name)
    return next((name for name, part in parts if any(c.__name__ == "FSDPModule" for c in type(part).__mro__)), "")


def original_of(model: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a compiled model or function was made of, and the options it was compiled with for this backend."""
    options: dict[str, Any] = {}
    while True:
        inner = model_below(model)
        if inner is None or inner is model:
            return model, options
        backend: Any = getattr(_context_of(model), "callback", None)
        for _ in range(8):  # below what Dynamo wraps around a backend
            given = getattr(backend, "kwargs", None)
            if isinstance(given, dict) and isinstance(given.get("options"), dict):
                options = {**given["options"], **options}
            backend = backend_below(backend)
        model = inner


def _context_of(model: Any) -> Any:
    """Dynamo's context of a compiled module (an attribute) or function (in its closure)."""
    names = getattr(getattr(model, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(model, "__closure__", None) or (), strict=False))
    return getattr(model, "dynamo_ctx", None) or (cells["self"].cell_contents if "self" in cells else None)
