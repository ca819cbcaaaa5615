"""Every notebook runs, and says what its committed outputs say."""

import base64
import importlib.util
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(autouse=True)
def tools():
    missing = [name for name in ("nbclient", "ipykernel", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: pip install '.[notebooks]'")


def small_model():
    """The notebooks' own module, which lies beside them."""
    spec = importlib.util.spec_from_file_location("small_model", FOLDER / "small_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint():
    try:
        return small_model().checkpoint()
    except OSError as error:
        pytest.skip(f"the notebooks' model cannot be had: {error}")


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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, request):
    import nbclient
    import nbformat

    committed = nbformat.read(path, as_version=4)
    if any("small_model" in cell.source for cell in committed.cells):
        request.getfixturevalue("checkpoint")
    assert all(cell.execution_count for cell in committed.cells if cell.cell_type == "code"), "commit it executed"
    found = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(FOLDER)}}  # as Jupyter runs it
    nbclient.NotebookClient(found, timeout=500, kernel_name="python3", resources=where).execute()
    for now, before in zip(printed(found), printed(committed), strict=True):
        assert NUMBER.sub("#", now) == NUMBER.sub("#", before)
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (now, before)]
        np.testing.assert_allclose(*numbers, rtol=0.2, atol=0.02)  # training rounds otherwise on another machine
    assert len(figures(found)) == len(figures(committed))
    assert all(map(is_drawn, figures(found)))


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_the_small_model_is_the_one_published(checkpoint):
    """The figure that comes with its weights, on text that is not theirs: what it says is in English, not noise."""
    import gptq_jax

    model = gptq_jax.load(checkpoint)
    text = "Alice was beginning to get very tired of sitting by her sister on the bank"
    ids = model.tokenizer(text)["input_ids"]
    assert model.tokenizer.decode(ids) == text
    shuffled = np.random.default_rng(0).permutation(ids)
    assert gptq_jax.perplexity(model, ids, length=len(ids)) < 40
    assert gptq_jax.perplexity(model, shuffled, length=len(ids)) > 400
