"""The notebooks, run from start to end by a real kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


@pytest.mark.slow
def test_the_miniature_runs_from_start_to_end(tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "miniature.ipynb", as_version=4)
    sizes = next(cell for cell in notebook.cells if "NUM_UPDATES =" in cell.source)
    assert "NUM_UPDATES = 100" in sizes.source and "NUM_TEST_CASES = 200" in sizes.source
    sizes.source = sizes.source.replace("= 100", "= 2").replace("= 200", "= 8")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "| all " in printed and "default_0" in printed
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4  # cases, curve, gains, edits
    assert (tmp_path / "outputs" / "notebook" / "README.md").is_file()
