"""Tiles by measurement: a small sweep for each shape around the table's choice, the step and the transposed product together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from deq_compile.testing import Factors, Tiles, apply_transpose, by_shape, tuned

from .common import Setting
from .kernel_times import DRY_SHAPES, MEMORY, SHAPES, filled

GAIN = 0.97  # a change that gains less is noise, and the table stays


def candidates(plain: Tiles, D: int) -> Iterator[Tiles]:
    """Around the table's tiles: warps, columns, stages, slabs."""
    for warps in (4, 8):
        for columns in (512, 1024, 2048):
            for stages in (2, 3, 4):
                yield dataclasses.replace(plain, warps=warps, BD2=columns, stages=stages)
    if plain.slabs > 1:
        for width in (2048, 8192, 16384):
            slabs = min(-(-D // width), 64)
            slab = (-(-D // slabs) + 15) // 16 * 16
            yield dataclasses.replace(plain, slabs=-(-D // slab), slab=slab)


def run(setting: Setting) -> None:
    """Sweep the shapes, largest first; on a device the winners go to the file that the kernels read."""
    memory = 6 if setting.dry else MEMORY
    shapes = DRY_SHAPES if setting.dry else sorted(SHAPES, key=lambda s: -s[1] * s[2])
    for what, B, D in shapes:
        with setting.guarded("tuning", B=B, D=D):
            if (best := _one_shape(setting, what, B, D, memory)) is not None and not setting.dry:
                setting.row("tuning: saved", file=str(tuned.save(best)))
        if not setting.enough(10, what):
            return


def _one_shape(setting: Setting, what: str, B: int, D: int, memory: int) -> dict[str, dict[str, int]] | None:
    n = 4 if setting.dry else 16
    state, z, f = filled(setting, B, D, n, torch.float32, memory)
    factors, at = Factors(S=state.S, C=state.C, n=state.n, slots_written=n), z.clone()
    where = tuned.key(B, D, memory + 1, 4)
    plain = by_shape(B, D, memory + 1)
    tried = list(dict.fromkeys([plain, *candidates(plain, D)]))[: 2 if setting.dry else None]

    def reset() -> None:
        state.n.fill_(n)
        z.copy_(at)

    def both() -> None:
        state.step(z, f)
        apply_transpose(factors, f)

    times: dict[Tiles, float] = {}
    for cut in tried:
        if setting.left < 5:
            break
        state.scratch.clear()
        with tuned.using({where: dataclasses.asdict(cut)}):
            times[cut] = setting.device_us(both, reset, repeats=5)
    best = min(times, key=times.__getitem__)
    setting.row(
        "tuning", shape=what, B=B, D=D, tried=len(times), us_table=round(times[plain], 2), us_best=round(times[best], 2),
        best=dataclasses.asdict(best),
    )  # fmt: skip
    return {where: dataclasses.asdict(best)} if times[best] < GAIN * times[plain] else None
