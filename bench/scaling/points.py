"""The sizes that are measured: one model, z ← tanh(W z + U x) with |W|₂ = 0.95, larger in one direction at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench import problems
from bench.tables import cases


@dataclass(frozen=True)
class Point:
    """A problem of the tables' kind, with its sizes in its name.

    D, B   unknowns of a sample, samples
    N      iterations of the user's loop
    """

    D: int
    B: int
    N: int

    @property
    def name(self) -> str:
        return f"mlp-D{self.D}-B{self.B}-N{self.N}"

    @staticmethod
    def parse(name: str) -> Point:
        """The point of that name.

        Raises:
            ValueError: a name of another form.
        """
        found = re.fullmatch(r"mlp-D(\d+)-B(\d+)-N(\d+)", name)
        if found is None:
            raise ValueError(f"expected a name like mlp-D256-B32-N30, got {name!r}")
        D, B, N = map(int, found.groups())
        return Point(D, B, N)

    def register(self) -> None:
        """Let the tables' machinery find this point among the problems."""
        D = self.D
        problems.PROBLEMS[self.name] = (lambda n, inject: problems.MLP(D, n, inject), (self.B, D))
        cases.ITERATIONS[self.name] = self.N


# Sweep -> its points, in order; "memory" is measured in processes of their own.
Sweeps = dict[str, list[Point]]
AXES = {"D": "unknowns D", "B": "samples B", "N": "iterations of the loop N", "memory": "iterations of the loop N"}


def sweeps(quick: bool) -> Sweeps:
    if quick:
        return {
            "D": [Point(D, 8, 30) for D in (16, 64)],
            "B": [Point(64, B, 30) for B in (1, 8)],
            "N": [Point(64, 8, N) for N in (10, 30)],
            "memory": [Point(64, 1024, N) for N in (10, 30)],
        }
    return {
        "D": [Point(D, 32, 30) for D in (16, 64, 256, 1024, 2048)],
        "B": [Point(256, B, 30) for B in (1, 8, 32, 128, 512, 2048)],
        "N": [Point(256, 32, N) for N in (10, 30, 100, 300, 1000)],
        "memory": [Point(256, 1024, N) for N in (10, 30, 100, 300)],  # a state of 1 MB
    }


def coordinate(sweep: str, point: Point) -> int:
    return {"D": point.D, "B": point.B}.get(sweep, point.N)


def describe(sweep: str, points: list[Point]) -> str:
    first = points[0]
    fixed = {"D": f"B = {first.B}, N = {first.N}", "B": f"D = {first.D}, N = {first.N}"}
    return fixed.get(sweep, f"D = {first.D}, B = {first.B}")
