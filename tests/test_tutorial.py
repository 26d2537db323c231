"""`docs/tutorial.ipynb`: it was executed, and its cells run, with fewer images and steps."""

import os
import re
from typing import Any

import pytest

from tests.helpers.paths import REPO

nbformat: Any = pytest.importorskip("nbformat", reason="needs the extra docs")
nbclient: Any = pytest.importorskip("nbclient", reason="needs the extra docs")

SHORTER = {
    "ShapesDetection(3000,": "ShapesDetection(32,",
    "ShapesDetection(200,": "ShapesDetection(24,",
    "ShapesImageLabels(3000,": "ShapesImageLabels(36,",
    "max_minutes=2,": "max_minutes=0.01,",
    '"trainer.enable_progress_bar": False': (
        '"trainer.enable_progress_bar": False, "trainer.max_steps": 4, '
        '"trainer.val_check_interval": 2'
    ),
}


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(REPO / "docs/tutorial.ipynb", 4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_was_executed_in_order_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 3
    assert not re.findall(r"/(?:tmp|home|root|work)/\S*", str(outputs))


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_cells_run(notebook, tmp_path, monkeypatch):
    cells = code_cells(notebook)
    for text, shorter in SHORTER.items():
        assert sum(cell.source.count(text) for cell in cells) == 1, text
        for cell in cells:
            cell.source = cell.source.replace(text, shorter)
    monkeypatch.setenv("PYTHONPATH", f"{REPO}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = {"timeout": 500, "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, **options).execute()
    described = code_cells(notebook)[-1].outputs[0].data["text/markdown"]
    assert "Recipe **shapes**: 32 images with boxes (6 classes)" in described
