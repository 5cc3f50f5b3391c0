"""What runs in a group's process."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator

from . import cli, compile_ahead, plan
from .common import Setting
from .store import Store


def run(args: argparse.Namespace) -> int:
    """Run one group, or one share of the compiling, or all of a rehearsal, in this process."""
    os.setpgrp()  # a group, and not a session: whoever kills the whole session still reaches it
    store, labels = Store(cli.results_file(args.out, args.dry_run)), [g.label for g in plan.chosen(args.parts, args.call)]

    def setting(label: str) -> Setting:
        part, _, name = label.partition(".")
        return Setting(part, name, store, args.dry_run, args.until, args.run)

    if not args.dry_run:
        full_float32()
    if args.child == "compile":
        compile_ahead.run_share(setting("compile"), set(labels), args.share)
    elif args.child == "all":
        with rehearsal():
            rehearse_all([setting(label) for label in labels], args.share)
    else:
        body_of(setting(args.child).part)(setting(args.child))
    return 0


def full_float32() -> None:
    """Convolutions in full float32, as torch's matrix products are: its default for them is TF32, which rounds to 5e-4, so that
    neither errors nor residuals below that would say anything. For all ways alike."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def rehearse_all(settings: list[Setting], share: str) -> None:
    """All groups one after the other, and the compiling ahead; what a group raises becomes a row, as a process's end would."""
    first = settings[0]
    ahead = Setting("compile", "", first.store, first.dry, first.until, first.run)
    compile_ahead.run_share(ahead, {s.part for s in settings} & {"kernels"}, share)  # one part's tasks: nothing is compiled
    for setting in settings:
        begun, outcome = time.time(), ""
        try:
            body_of(setting.part)(setting)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:300]
        setting.row("outcome", outcome=outcome, seconds=round(time.time() - begun, 1))
        setting.forget()


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """No device: Triton's interpreter and stand-ins for graphs."""
    from .interpreter import quicken
    from .rehearse import rehearsed

    quicken()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy on the inf and NaN that are masked away
        with rehearsed():
            yield


def body_of(part: str) -> Callable[[Setting], None]:
    """The function of a part; its module is imported here, so that no group waits for the imports of others."""
    import importlib

    modules = {"first": "first", "probe": "probes", "kernels": "kernel_times"}
    found: Callable[[Setting], None] = importlib.import_module(f".{modules.get(part, part)}", __package__).run
    return found
