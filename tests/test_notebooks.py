"""Every notebook runs, and says what its committed outputs say."""

import base64
import importlib.util
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(autouse=True)
def tools():
    missing = [name for name in ("nbclient", "ipykernel", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: pip install '.[notebooks]'")


def printed(notebook):
    """What each code cell prints."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def figures(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def is_drawn(png):
    """More than a blank page: axes, labels and points leave several per cent of it dark or coloured."""
    import matplotlib.image

    pixels = matplotlib.image.imread(BytesIO(base64.b64decode(png)))[..., :3]
    return 0.01 < np.mean(pixels.min(axis=-1) < 0.9) < 0.5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    import nbclient
    import nbformat

    committed = nbformat.read(path, as_version=4)
    assert all(cell.execution_count for cell in committed.cells if cell.cell_type == "code"), "commit it executed"
    found = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(found, timeout=500, kernel_name="python3").execute()
    for now, before in zip(printed(found), printed(committed), strict=True):
        assert NUMBER.sub("#", now) == NUMBER.sub("#", before)
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (now, before)]
        np.testing.assert_allclose(*numbers, rtol=0.2, atol=0.02)  # training rounds otherwise on another machine
    assert len(figures(found)) == len(figures(committed))
    assert all(map(is_drawn, figures(found)))


def test_there_are_notebooks():
    assert NOTEBOOKS
