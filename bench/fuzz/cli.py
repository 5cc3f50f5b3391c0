"""``python -m bench fuzz``: random programs with loops in them, each compared with eager float64, value and gradients.

A program is rewritten right, kept right, refused with a reason, or seen as no loop; one that comes out wrong, or that
raises where eager does not, is made smaller, saved as a runnable file, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from .forms import FORMS
from .grammar import Recipe, random_recipe, source
from .oracle import VERDICTS, Verdict, judge
from .shrink import shrink


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=5.0, help="time to spend (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the programs are a function of it (default %(default)s)")
    parser.add_argument("--programs", type=int, default=None, help="stop after this many (default: when the time is up)")
    parser.add_argument("--form", choices=list(FORMS), default=None, help="only loops of this form")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder (default %(default)s)")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    tally, start = Tally(), time.monotonic()
    limit = args.programs if args.programs is not None else 10**9
    with tqdm(total=args.programs, unit="program", dynamic_ncols=True, mininterval=2.0) as progress:
        for index in range(limit):
            if time.monotonic() - start > 60 * args.minutes:
                break
            recipe = random_recipe(random.Random(f"{args.seed}/{index}"), args.form)
            verdict = judge(source(recipe))
            tally.add(recipe, verdict)
            if verdict.wrong:
                path = save(recipe, args.failures, f"seed{args.seed}-{index}-{recipe.form}.py")
                progress.write(f"WRONG {path}: {verdict.detail.splitlines()[0]}")
            progress.set_postfix(wrong=tally.verdicts["WRONG"], solved=tally.verdicts["rewritten-right"], refresh=False)
            progress.update()
    print(tally.text(time.monotonic() - start))
    return int(tally.verdicts["WRONG"] > 0)


def save(recipe: Recipe, folder: Path, name: str) -> Path:
    """The shrunk program as a file that reproduces the failure when run."""
    small = shrink(recipe, lambda smaller: judge(source(smaller)).wrong)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(source(small))
    return path


class Tally:
    """Counts by verdict, by form of loop, and by reason."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.forms: dict[str, Counter[str]] = {}
        self.reasons: Counter[str] = Counter()

    def add(self, recipe: Recipe, verdict: Verdict) -> None:
        self.verdicts[verdict.kind] += 1
        self.forms.setdefault(recipe.form, Counter())[verdict.kind] += 1
        self.reasons.update(verdict.reasons)

    def text(self, seconds: float) -> str:
        total = sum(self.verdicts.values())
        by_form = [[form, *(self.forms[form][v] or "" for v in VERDICTS)] for form in FORMS if form in self.forms]
        tables = [
            tabulate([[v, self.verdicts[v]] for v in VERDICTS], headers=["verdict", "programs"]),
            tabulate(by_form, headers=["form", *VERDICTS]),
            tabulate(self.reasons.most_common(), headers=["reason", "programs"]),
        ]
        rate = total / seconds if seconds else 0.0
        return "\n\n".join([*tables, f"{total} programs in {seconds:.0f} s, {rate:.2f} a second"])
