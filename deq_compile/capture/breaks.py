"""What ends a graph inside of a loop, and so leaves the loop to Python: told, with the line and what to write instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deq_compile.report import Reason, Skipped

from . import dynamo, sites, varying

_BACKWARD = "`torch.autograd.grad`"  # in the loop of a hook that stays, of which more is said elsewhere
LONGEST = 160  # letters of what Dynamo says


def call_handler(original: Callable[..., Any], in_loop: Callable[[Any], bool]) -> Callable[..., Any]:
    """A translator's `call_function` that tells of calls which Dynamo cannot trace, and of ranges that no graph can hold."""

    @functools.wraps(original)
    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if sites.ours(self):
            with sites.guarded(self, "looking at the count of a loop"):
                varying.range_called(self, fn, args)
        try:
            return original(self, fn, args, kwargs)
        except dynamo.DynamoException as error:
            if type(error).__name__ == "Unsupported" and not hasattr(error, "_deq_compile_told") and sites.ours(self):
                error._deq_compile_told = True  # the frames around it see it too
                if in_loop(self) and _BACKWARD not in str(error):
                    detail = f"Dynamo cannot trace a call in it: {_first(str(error))}"
                    sites.tell(self, Skipped(Reason.BROKEN, sites.location(self), detail))
            raise

    return call_function


def branch(tx: Any) -> None:
    """Tell of a branch in a loop's body whose condition depends on data. That of an `assert` ends no graph."""
    if getattr(getattr(tx, "next_instruction", None), "opname", "") == "LOAD_ASSERTION_ERROR":
        return
    sites.tell(tx, Skipped(Reason.BRANCH, sites.location(tx)))


def _first(text: str) -> str:
    """What it is, and the first sentence of the explanation."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    more = [line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Explanation:")]
    sentence = " ".join([lines[0] if lines else "", *(m.split(". ")[0] for m in more[:1])])
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]}…"
