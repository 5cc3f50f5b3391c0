"""Calls that mean a fixed point, taken while Dynamo traces them.

A recogniser looks at a call (the function and Dynamo's variables for its arguments) and says by which adapter it is to be
traced: a function of this package, called with the name of the place and then with the user's own arguments. Where none
recognises it, or the place is blocked, Dynamo goes on with the user's function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deq_compile.report import Reason, Skipped
from deq_compile.unexpected import survive

from . import dynamo, effects, sites

Adapter = Callable[..., Any]
# The adapter of a call, to be given the call's own arguments or, in a pair, others; or why the call is left alone.
Found = Adapter | tuple[Adapter, list[Any]] | Skipped | None
# (translator, function, arguments, keyword arguments) -> ...; None: the call means nothing to us
Recogniser = Callable[[Any, Any, Sequence[Any], Mapping[str, Any]], Found]
_by_function: dict[Any, Adapter] = {}
_recognisers: list[Recogniser] = []


def take(function: Any, adapter: Adapter) -> None:
    """Trace calls of `function` by `adapter(site, *args, **kwargs)`."""
    _by_function[function] = adapter


def give_back(function: Any) -> None:
    """The opposite of `take`."""
    _by_function.pop(function, None)


def add(recogniser: Recogniser) -> None:
    """Ask `recogniser` about every call that is traced; it should be quick to say None."""
    _recognisers.append(recogniser)


def remove(recogniser: Recogniser) -> None:
    """The opposite of `add`."""
    _recognisers.remove(recogniser)


def install() -> Callable[[], None]:
    """Patch Dynamo; returns what takes the patch out again."""
    original = dynamo.UserFunctionVariable.call_function

    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if sites.ours(tx):
            arguments = [*self.self_args(), *args]
            found = _ask(tx, self.fn, arguments, kwargs)
            if found is not None:
                site = sites.site_of(tx, _name(self.fn))
                if isinstance(found, Skipped):
                    sites.refuse(tx, site, dataclasses.replace(found, location=sites.location(tx)))
                elif not sites.blocked(tx, site):
                    if isinstance(found, tuple):
                        (found, arguments), kwargs = found, {}
                    with sites.guarded(tx, "tracing a call as a fixed point"):
                        return _adapted(tx, site, found, arguments, kwargs)
        return original(self, tx, args, kwargs)

    dynamo.UserFunctionVariable.call_function = call_function

    def take_out() -> None:
        dynamo.UserFunctionVariable.call_function = original

    return take_out


def _adapted(tx: Any, site: str, adapter: Any, arguments: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    roots = [*arguments, *kwargs.values()]
    before = effects.around(tx, roots)
    with dynamo.numbers_of_tensors(tx):
        result = dynamo.UserFunctionVariable(adapter).call_function(tx, [dynamo.build(tx, site), *arguments], kwargs)
    # the body was traced once and will run many times: tensors that get out of it are for the passes to see
    what = effects.changed(before, effects.around(tx, roots))
    if what is not None:
        sites.tell(tx, Skipped(Reason.SIDE_EFFECT, sites.location(tx), f"{what} changes whenever f is called"))
        sites.retrace([site])
    return result


def _ask(tx: Any, function: Any, arguments: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
    try:
        found: Found = _by_function.get(function)
    except TypeError:  # not hashable
        return None
    try:
        for recogniser in _recognisers:
            if found is not None:
                break
            found = recogniser(tx, function, arguments, kwargs)
    except dynamo.DynamoException:
        raise
    except Exception as error:  # it has only looked: Dynamo goes on with the user's function
        sites.tell(tx, survive(error, "looking at a call", sites.location(tx)))
        return None
    return found


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
