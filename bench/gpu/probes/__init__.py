"""What was assumed about the device before anything ran on one, asked one by one: an answer, a number, and what was predicted.

Groups run as processes of their own, so that a hang or a broken context costs one group. The numbers are those of the review of
the GPU path; a probe calls the project's own functions wherever there are any.
"""

from __future__ import annotations

from ..common import Setting
from . import condition, engines, failures, race
from .registry import Probe, of_group

GROUPS = {"condition": condition, "engines": engines, "race": race, "failures": failures}


def run(setting: Setting) -> None:
    """All probes of the setting's group, a row each."""
    for probe in of_group(setting.group):
        if not setting.enough(2, probe.name):
            return
        ask(setting, probe)


def ask(setting: Setting, probe: Probe) -> None:
    what = f"probe {probe.name}"
    if setting.dry and probe.needs_device:
        setting.row(what, skipped="only a device can tell", predicted=probe.predicted)
        return
    with setting.guarded(what, predicted=probe.predicted):
        found = probe.ask(setting)
        setting.row(what, ok=found.ok, predicted=probe.predicted, **found.numbers)


__all__ = ["GROUPS", "Probe", "ask", "of_group", "run"]
