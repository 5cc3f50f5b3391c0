"""A report as HTML, for notebooks and for files."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report

# Colours of text and lines are the reader's own, so that dark pages stay readable; only verdicts have one.
STYLE = """\
.deq-report { overflow-x: auto; }
.deq-report table { border-collapse: collapse; font-size: 0.9em; }
.deq-report th, .deq-report td { border-bottom: 1px solid rgba(128, 128, 128, 0.4); padding: 0.3em 0.8em; text-align: left; }
.deq-report ul { font-size: 0.9em; padding-left: 1.2em; }
.deq-report .solve, .deq-report .follow { color: #2a9d4a; font-weight: bold; }
.deq-report .kept { color: #d08700; font-weight: bold; }"""


def html_of(report: Report) -> str:
    """One `div` with a style of its own, the regions as a table and everything else as a list; all text is escaped."""
    head, *rows = report.rows()
    table = ""
    if rows:
        statuses = [region.status for region in report.regions]
        pairs = zip(rows, statuses, strict=True)
        body = "".join(f"<tr>{_status(row[0], status)}{_cells('td', row[1:])}</tr>" for row, status in pairs)
        table = f"<table><thead><tr>{_cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"
    remarks = "".join(f"<li>{escape(line)}</li>" for line in report.remarks())
    remarks = f"<ul>{remarks}</ul>" if remarks else ""
    return f'<div class="deq-report"><style>\n{STYLE}\n</style>{table}{remarks}</div>'


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _status(text: str, status: str) -> str:
    return f'<td class="{escape(status)}">{escape(text)}</td>'
