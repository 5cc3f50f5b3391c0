"""Tables and numbers as they stand in texts."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, figures to the right."""
    alignment = ("left", *["right"] * (len(headers) - 1))
    return tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=alignment)


def times(value: float) -> str:
    """A ratio with two significant digits, as in "5.6 times" or "13 times"."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def span(values: Sequence[float], form: str = ".2g") -> str:
    """The least and the largest, or the one that there is."""
    low, high = (format(edge(values), form) for edge in (min, max))
    return low if low == high else f"{low} to {high}"
