"""The notebook of the documentation runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_run.ipynb"


def run(place: Path, steps: int | None = None) -> Any:
    """Execute it in an empty directory, with other steps if they are given."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if steps is not None:
        for cell in notebook.cells:
            cell.source = re.sub(r'("train.steps"|"eval.every_steps"): \d+', rf"\1: {steps}", cell.source)
        assert f'"train.steps": {steps}' in "".join(cell.source for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(place)}}).execute()
    return notebook


@pytest.mark.timeout(900)
def test_every_cell_runs(tmp_path: Path) -> None:
    notebook = run(tmp_path, steps=4)
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 2 and (tmp_path / "model" / "model.safetensors").is_file()
    assert len([*(tmp_path / "runs").glob("*/record.json")]) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_printed_scores_are_those_of_its_runs(tmp_path: Path) -> None:
    def scores(notebook: Any) -> list[str]:
        texts = [
            out["data"]["text/plain"] for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out
        ]
        return [text for text in texts if "miou" in text or "background" in text]

    assert scores(run(tmp_path)) == scores(nbformat.read(NOTEBOOK, as_version=4))


def test_its_outputs_name_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "/home/" not in text and "site-packages" not in text and str(ROOT) not in text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
