"""The notebooks run from the first cell to the last and give the outputs stored in them."""

import re
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
EXACT = "a_dualpipe_table"  # whole numbers and their ratios, so the same on every machine


def said(book, exact):
    """The joined output of every cell; unless `exact`, numbers are masked, since they depend on rounding."""
    cells = (cell for cell in book.cells if cell.cell_type == "code")
    texts = ["".join(out.get("text") or out["data"]["text/plain"] for out in cell.outputs) for cell in cells]
    return texts if exact else [re.sub(r"-?\d[\d.,]*(e-?\d+)?", "#", text) for text in texts]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebook(file, monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    written, rewritten = (nbformat.read(file, 4) for _ in range(2))
    nbclient.NotebookClient(rewritten, timeout=120, kernel_name="python3").execute()
    exact = file.stem == EXACT
    assert said(rewritten, exact) == said(written, exact)
