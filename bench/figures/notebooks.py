"""Notebooks of the site: two of the examples, cell by cell, run and kept with what they show."""

from __future__ import annotations

from typing import Any

from .sources import ROOT

NAMES = ("graph", "deblurring")
FOLDER = ROOT / "docs" / "notebooks"


def of_script(name: str) -> Any:
    """The notebook of ``examples/<name>.py``, whose cells stand between lines of ``# %%``, not run yet."""
    import jupytext

    return jupytext.read(ROOT / "examples" / f"{name}.py", fmt="py:percent")


def run(name: str) -> None:
    """Run the cells and write the notebook, with paths cut down to what is below the repository.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell that fails.
    """
    import nbclient
    import nbformat

    notebook = of_script(name)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            for kind, text in ("text", output.get("text")), ("text/plain", output.get("data", {}).get("text/plain")):
                if text is not None:
                    (output if kind == "text" else output["data"])[kind] = _without_folders(text)
    FOLDER.mkdir(exist_ok=True)
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


def _without_folders(text: str) -> str:
    import re
    import tempfile

    for folder in (str(ROOT) + "/", tempfile.gettempdir() + "/"):
        text = text.replace(folder, "")
    return re.sub(r"ipykernel_\d+/\d+\.py", "cell.py", text)
