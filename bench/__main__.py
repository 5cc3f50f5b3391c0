"""The command line: ``python -m bench COMMAND``, from the repository."""

from __future__ import annotations

import argparse
import sys

from bench import against, demo, kernels, overhead, sizes, start, step, watch
from bench.figures import cli as figures
from bench.fuzz import cli as fuzz
from bench.gpu import cli as gpu
from bench.gradients import cli as gradients
from bench.language import cli as language
from bench.multistable import cli as multistable
from bench.reach import cli as reach
from bench.recycle import cli as recycle
from bench.roofline import cli as roofline
from bench.scaling import cli as scaling
from bench.tables import cli as tables
from bench.tables import compile_time

# A command is a module with `add_arguments(parser)`, `main(args) -> exit status`, and a docstring.
COMMANDS = {
    "against": against,
    "compile-time": compile_time,
    "demo": demo,
    "figures": figures,
    "fuzz": fuzz,
    "gpu": gpu,
    "gradients": gradients,
    "kernels": kernels,
    "language": language,
    "multistable": multistable,
    "overhead": overhead,
    "reach": reach,
    "recycle": recycle,
    "roofline": roofline,
    "scaling": scaling,
    "sizes": sizes,
    "start": start,
    "step": step,
    "tables": tables,
    "watch": watch,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of deq_compile.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        sub = commands.add_parser(
            name,
            help=text.splitlines()[0].split(": ", 1)[1],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    args = parser.parse_args(argv)
    return COMMANDS[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
