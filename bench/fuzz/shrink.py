"""Make a failing recipe smaller: fewer stages, simpler choices, one at a time, as long as it still fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from .grammar import Recipe

_SIMPLEST = Recipe(form="plain")
_SIMPLER = (
    "place", "poison", "calls", "output", "injection", "initial", "dtype", "domain", "training", "end", "gain", "count", "batch",
    "seed",
)  # fmt: skip


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool], tries: int = 60) -> Recipe:
    """The smallest failing recipe that greedy steps find; `fails` is called at most `tries` times."""
    progress = True
    while progress and tries > 0:
        progress = False
        for smaller in _candidates(recipe):
            if tries <= 0:
                break
            tries -= 1
            if fails(smaller):
                recipe, progress = smaller, True
                break
    return recipe


def _candidates(recipe: Recipe) -> Iterator[Recipe]:
    def changed(field: str, value: Any) -> Recipe:
        return dataclasses.replace(recipe, **{field: value})

    if recipe.form != "plain":
        yield changed("form", "plain")
    for field in ("first", "second"):
        stages = getattr(recipe, field)
        if len(stages) > 1:
            yield changed(field, ())
        for i in range(len(stages)):
            yield changed(field, stages[:i] + stages[i + 1 :])
    for field in _SIMPLER:
        simple = getattr(_SIMPLEST, field)
        if getattr(recipe, field) != simple and (field != "domain" or not recipe.first + recipe.second):
            yield changed(field, simple)
