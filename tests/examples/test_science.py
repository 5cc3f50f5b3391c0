"""The examples of science: a graph, a photograph, a text. What each shows is true, at fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.figures import notebooks
from examples import deblurring, graph, language_model

QUICK = {"inner": "eager"}


def test_the_graph_network_tells_the_factions_apart() -> None:
    found = graph.main(steps=30, options=QUICK)
    assert found["deq"] == found["eager"] > 0.85
    assert found["evaluations"] < found["rounds"] / 2
    assert [region.status for region in found["report"].regions] == ["solve"]


@pytest.mark.thorough
def test_the_photograph_gets_sharper() -> None:
    found = deblurring.main(steps=3, batch=2, size=24, options=QUICK)
    assert found["psnr"]["restored"] > found["psnr"]["blurred"] + 1
    assert abs(found["psnr"]["restored"] - found["psnr"]["by the loop"]) < 0.05
    assert len(found["report"].regions) == 1


def test_the_language_model_learns_more_than_frequencies() -> None:
    found = language_model.main(steps=40, batch=6, sample=4, options=QUICK)
    assert found["losses"][-1] < found["unigram"] < found["losses"][0]
    assert abs(found["loss by deq"] - found["loss by the loop"]) < 1e-3
    assert found["solved"] == 1
    assert found["evaluations"] < 10


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_has_the_cells_of_its_script_and_was_run(name: str) -> None:
    """Fix: python -m bench figures --notebooks."""
    pytest.importorskip("jupytext", reason="the extra `docs` is not installed")
    import nbformat

    notebook = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    made = notebooks.of_script(name)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [(cell.cell_type, cell.source) for cell in made.cells]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot"
    assert not any(output.output_type == "error" for output in outputs)
    assert str(Path.cwd()) not in str(notebook)


def test_threads_are_as_the_suite_set_them() -> None:
    """An example that changed a setting of the process would change it for whoever copies it."""
    assert torch.get_num_threads() == 1
