"""The table of probes, filled by a decorator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..common import Setting


@dataclass(frozen=True)
class Finding:
    """Whether what was assumed holds, and the numbers that say so."""

    ok: bool
    numbers: dict[str, Any] = field(default_factory=dict)


Ask = Callable[[Setting], Finding]


@dataclass(frozen=True)
class Probe:
    """One question.

    predicted     what was expected before any device was asked
    needs_device  whether a rehearsal cannot ask it at all
    """

    group: str
    name: str
    predicted: str
    needs_device: bool
    ask: Ask


_probes: list[Probe] = []


def probe(group: str, name: str, predicted: str, needs_device: bool = False) -> Callable[[Ask], Ask]:
    """Register a function as a probe."""

    def register(ask: Ask) -> Ask:
        _probes.append(Probe(group, name, predicted, needs_device, ask))
        return ask

    return register


def of_group(group: str) -> list[Probe]:
    return [p for p in _probes if p.group == group]
