"""docs/quickstart.ipynb runs from its first cell to its last, and shows what it says."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in shown)
    assert "restored: True" in text and "<Model RecallForCausalLM: 2 blocks, 10 matrices>" in text
    assert "accuracy_clean" in text and "('ablation', ('metrics', 'examples')" in text
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 2
    assert sorted(os.listdir(tmp_path)) == ["quickstart-study"]


def test_the_notebook_is_committed_without_outputs():
    """They would be another machine's, and a picture of numbers that nobody checked."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
