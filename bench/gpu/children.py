"""What runs in a group's process."""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

from . import cli, plan
from .common import Setting
from .store import Store


def run(args: argparse.Namespace) -> int:
    """Run one group, or one share of the compiling, in this process."""
    os.setpgrp()  # a group, and not a session: whoever kills the whole session still reaches it
    part, _, name = args.child.partition(".")
    setting = Setting(part, name, Store(cli.results_file(args.out, args.dry_run)), args.dry_run, args.until, args.run)
    with rehearsal() if args.dry_run else contextlib.nullcontext():
        if part == "compile":
            from .compile_ahead import run_share

            run_share(setting, {g.label for g in plan.chosen(args.parts, args.call)}, args.share)
        else:
            body_of(part)(setting)
    return 0


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
