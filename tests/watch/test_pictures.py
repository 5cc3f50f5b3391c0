"""The picture of a training, and a report as HTML."""

from __future__ import annotations

import html
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deq_compile import Location, Reason, Region, Report, Skipped, SolveRecord, explain
from deq_compile.report import Standing
from deq_compile.watch import SolveLogger, plot_solves


def course(steps: int = 3) -> list[SolveRecord]:
    found = []
    for step in range(steps):
        found.append(
            SolveRecord("a", "solve", iterations=5.0 + step, residual=10.0**-step, vjps=3, adjoint_residual=0.1, where="m.py:1")
        )
        found.append(SolveRecord("b", "kept", iterations=30.0, vjps=30, where="m.py:9"))
    return found


def drawn(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_the_lines_are_the_records(tmp_path: Path) -> None:
    lines = drawn(plot_solves(course(), tmp_path / "solves.png"))
    assert lines["m.py:1: iterations"] == ([1.0, 2.0, 3.0], [5.0, 6.0, 7.0])
    assert lines["m.py:1: residual"] == ([1.0, 2.0, 3.0], [1.0, 0.1, 0.01])
    assert lines["m.py:9: iterations, kept"] == ([1.0, 2.0, 3.0], [30.0] * 3)
    assert "m.py:9: residual" not in lines  # it was not measured
    assert (tmp_path / "solves.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_drawn_as_its_rows_are(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    log = SolveLogger(tmp_path / "solves.csv", rows.append)
    for step, record in enumerate(course()[::2]):
        log._running.append(record)
        log.step(10 * step)
    log.close()
    path = tmp_path / "solves.csv"
    path.write_text(path.read_text() + "40,1,m.py:1,a")  # a last line that did not become whole
    assert drawn(plot_solves(path)) == drawn(plot_solves(rows))
    assert drawn(plot_solves(rows))["m.py:1: residual"][0] == [0.0, 10.0, 20.0]


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match=r"expected at least one record, got none\. Fix: explain"):
        plot_solves([])


@pytest.mark.parametrize("residual", [0.0, float("nan"), float("inf")])
def test_residuals_without_a_logarithm_are_drawn_too(residual: float, tmp_path: Path) -> None:
    lines = drawn(plot_solves([SolveRecord("a", "solve", residual=residual)] * 2, tmp_path / "solves.png"))
    assert str(lines["a: residual"][1][0]) == str(residual)
    assert "a: residual" not in drawn(plot_solves([SolveRecord("a", "kept")], tmp_path / "solves.png"))


def test_pyplot_is_left_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_solves(course())
    assert plt.get_fignums() == before


class Reader(HTMLParser):
    """The text of cells and items, and whether every tag was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th", "li"):
            self.texts.append(data)


def test_html_says_what_the_text_says() -> None:
    def loop(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(20):
            z = torch.tanh(0.5 * z + x)
        return z

    report = explain(loop, inner="eager")(torch.ones(2, 3))
    reader = Reader(report.to_html())
    assert not reader.open
    assert reader.texts == [*(cell for row in report.rows() for cell in row), *report.remarks()]
    assert report.regions[0].status in report.rows()[1][0]
    assert report._repr_html_() == report.to_html()


def test_text_of_the_user_is_escaped() -> None:
    evil = "<script>alert('&')</script>"
    region = Region(evil, evil, Location(evil, 3), (((evil,), evil),), 3, 0, (), evil, evil, (evil,), Standing(evil))
    report = Report([region], [Skipped(Reason.RANDOM, Location(evil, 1), evil)], graph_breaks=[evil])
    text = report.to_html()
    assert "<script" not in text
    assert html.escape(evil) in text
    assert any(evil in cell for cell in Reader(text).texts)
    assert not Reader(Report().to_html()).open
    assert "no fixed-point region" in Report().to_html()
