"""Fixed points in `torch.autograd.Function`s: said in the report, and left to Dynamo.

A backward that differentiates inside of itself cannot be traced, so the function stays outside of the graph. What its
forward calls may still be compiled on its own; the backward stays the user's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deq_compile.families.functions import differentiates_inside
from deq_compile.report import Reason, Skipped

from . import dynamo, sites

_FIX = "{name}.backward differentiates f again; z = deq_compile.fixed_point(lambda z: f(z, x), z0) in the place of {name}.apply"


def install() -> Callable[[], None]:
    """Patch Dynamo; returns what takes the patch out again."""
    original = dynamo.AutogradFunctionVariable.call_apply

    @functools.wraps(original)
    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        with sites.guarded(tx, "looking at an autograd function"):
            if sites.ours(tx) and differentiates_inside(self.fn_cls):
                detail = _FIX.format(name=self.fn_cls.__name__)
                sites.tell(tx, Skipped(Reason.AUTOGRAD_FUNCTION, sites.location(tx), detail))
        return original(self, tx, args, kwargs)

    dynamo.AutogradFunctionVariable.call_apply = call_apply

    def remove() -> None:
        dynamo.AutogradFunctionVariable.call_apply = original

    return remove
