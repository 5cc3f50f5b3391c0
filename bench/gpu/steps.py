"""Whole training steps, a workload a group: each way's time on the host, on the device and until all is done, and its errors."""

from __future__ import annotations

from typing import Any

import torch

from deq_compile import record_solves

from . import reference, ways, workloads
from .common import Setting, relative_error
from .models import engines_that_ran, steps_first
from .store import Row

SECONDS_A_WAY = 4  # less than this and a way is not begun


def run(setting: Setting) -> None:
    with setting.guarded("step", problem=setting.group):
        one_workload(setting, setting.group)


def one_workload(setting: Setting, name: str) -> None:
    workload = workloads.make(name, setting.dry).to(setting.device)
    exact = reference.exact(workload)
    done: dict[str, Row] = {}
    for label in ways.DRY if setting.dry else ways.ORDER:
        if not setting.enough(SECONDS_A_WAY, label):
            return
        about = {"problem": name, "way": label}
        is_peer = label not in ways.DEQ
        try:
            setting.forget()
            done[label] = one_way(setting, workload, label, exact)
            setting.row("step", **about, **done[label], **against(done, label))
        except ways.Skipped as skipped:
            setting.row("step", **about, skipped=str(skipped))
        except Exception as error:
            # A peer that cannot do this is no fault of ours; a broken context is everybody's.
            told = f"{type(error).__name__}: {error}"[:600]
            setting.row("step", **about, **({"failed": told} if is_peer else {"error": told}))
            if "CUDA error" in told:
                raise
        if not setting.dry:
            torch.cuda.empty_cache()


def one_way(setting: Setting, workload: workloads.Workload, label: str, exact: tuple[torch.Tensor, torch.Tensor]) -> Row:
    """Run a way until it is warm, read off what it found, then time it."""
    way = ways.make(setting, label, workload)
    for _ in range(steps_first(setting.dry)):
        way.step()
    setting.sync()
    value, gradient = way.read()
    row: Row = {"value_error": relative_error(value, exact[0]), "gradient_error": relative_error(gradient, exact[1])}
    if way.deq:
        with record_solves() as solves:
            way.step()
        setting.sync()
        row |= solved(solves) | engines_that_ran()
        wanted = label.split(",")[0].removeprefix("deq ")
        row["ok"] = row["status"] in ("solve", "follow") and (wanted == "loop" or row["forward"] == [wanted])
    return row | times(setting, way) | ({"note": way.note} if way.note else {})


def solved(solves: list[Any]) -> Row:
    """What a region's record says of one step."""
    if not solves:
        return {"status": "no region"}
    first = solves[0]
    return {"iterations": first.iterations, "vjps": first.vjps, "status": first.status, "message": first.message}


def times(setting: Setting, way: ways.Way) -> Row:
    """Milliseconds: `ms` until all is done, `ms_host` until the call returns, `ms_device` with the host out of the way."""
    repeats = 1 if setting.dry else 11
    row: Row = {"ms": round(setting.wall_us(way.step, repeats=repeats) / 1e3, 4)}
    if way.halves is None:
        return row
    timing = setting.timed(way.step, repeats=max(repeats // 2, 1))
    row |= {"ms_host": round(timing.host / 1e3, 4), "ms_device": round(timing.device / 1e3, 4), "host_hidden": timing.covered}
    forward, backward = way.halves
    losses: list[torch.Tensor] = []
    half = setting.wall_us(lambda: backward(losses.pop()), lambda: losses.append(forward()), repeats)
    return row | {"ms_backward": round(half / 1e3, 4)}


def against(done: dict[str, Row], label: str) -> Row:
    """How many times faster than the user's loop, its compilation, and the peer, where those have run."""
    names = {"against_eager": ways.EAGER, "against_inductor": ways.INDUCTOR, "against_torchdeq": ways.PEER}
    ms = done[label]["ms"]
    return {key: round(done[name]["ms"] / ms, 2) for key, name in names.items() if name in done}
