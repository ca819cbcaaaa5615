"""`gptq-jax compare` on a tiny model."""

import json
from pathlib import Path

import decoder_cases
import pytest
from decoder_models import TEXT, write_directory
from typer.testing import CliRunner

from gptq_jax.cli import app

CONFIG = {**decoder_cases.CASES["tied_gqa"], "vocab_size": 300, "num_hidden_layers": 1}


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and a text."""
    path = tmp_path_factory.mktemp("compared") / "tiny"
    write_directory(path, CONFIG)
    (path.parent / "text.txt").write_text(TEXT * 3)
    return path, path.parent / "text.txt"


def arguments(files, out, *more):
    model, text = files
    draws = ("--calibration", text, "--text", text, "--samples", 2, "--length", 24, "--eval-windows", 2)
    return ("compare", model, "--out", out, *draws, "--group-size", "24,-1", "--bits", 4, "--no-plots", *more)


def test_a_method_from_outside_and_a_run_that_fails(files, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])  # where its module is found from
    methods = ("--methods", "tests.own_methods:fails_on_columns")
    result = run(*arguments(files, tmp_path / "out", *methods, "--json"))
    assert result.exit_code == 1, result.stderr
    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {(row["method"], row["spec"]["group_size"]): row for row in data["rows"]}
    assert len(rows) == 2
    failed = {key for key, row in rows.items() if not row["values"]}
    assert failed == {("tests.own_methods:fails_on_columns", -1)}
    assert "NotImplementedError: whole columns" in str(rows[failed.pop()]["failed"])
    assert "1 of 2 runs failed" in result.stderr
    assert data["names"] == {"model": "tiny", "calibration": "text.txt", "held_out": "text.txt"}
    assert "<h1>Quantization methods compared on tiny</h1>" in (tmp_path / "out" / "report.html").read_text()
    # Again, with the grid that did not fail: everything is there already, and so is the row that failed.
    again = run(*arguments(files, tmp_path / "out", *methods, "--group-size", "24"))
    assert again.exit_code == 1
    assert again.stdout == (tmp_path / "out" / "table.md").read_text()
    assert json.loads((tmp_path / "out" / "table.json").read_text())["cells"] == data["cells"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "4,five"), "--bits '4,five' is no list of integers"),
        (("--bits", "5"), "bits=5 is not supported"),
        (("--seeds", "0,0"), "seeds=[0, 0] must be different"),
        (("--methods", "rtn,rtn"), "--methods 'rtn,rtn' names one twice"),
        (("--methods", "best"), "'best' is none of"),
        (("--dataset", "ptb"), "give either --text FILE or --dataset NAME"),
        (("--length", "129"), "length=129 must be"),
    ],
)
def test_errors_are_a_sentence(files, tmp_path, options, message):
    result = run(*arguments(files, tmp_path / "out", *options))
    assert result.exit_code == 2
    last = result.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()
