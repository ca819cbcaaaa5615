"""Tables, plots and the page of results made up for it."""

import base64
import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from gptq_jax import ComparisonTable, QuantSpec, write_report
from gptq_jax.comparison.cells import Cell, CellResult, Figures, LayerError
from gptq_jax.comparison.html import html_report
from gptq_jax.comparison.store import FloatFigures

FLOAT = FloatFigures(perplexity=20.0, nbytes=4_000_000)
METHODS = ("rtn", "gptq", "mine <b>|&")  # what would break a page or a table that trusts names
SPECS = [QuantSpec(bits=bits, group_size=group) for bits in (4, 3) for group in (64, -1)]


def result(method, spec, seed, *, perplexity=None, failed=None):
    layers = tuple(
        LayerError(path=f"layers.{index}.{name}", loss=0.1, rtn_loss=0.2, relative_error=0.1 / spec.bits + index / 100)
        for index in range(3)
        for name in ("q", "down")
    )
    figures = Figures(
        perplexity=perplexity or 20 + 50 / spec.bits**2 / (1 + METHODS.index(method)) + seed,
        kl=0.25,
        top1_agreement=0.5,
        bits_per_weight=spec.bits + 0.25,
        nbytes=1_000_000,
        seconds=10.0 + METHODS.index(method),
        compile_seconds=1.0,
        evaluation_seconds=2.0,
        peak_bytes=None,
        layers=layers,
    )
    cell = Cell(method, spec, seed)
    return CellResult(cell=cell, method={"name": method}, figures=None if failed else figures, failed=failed)


def table_of(results):
    return ComparisonTable.of(FLOAT, results, {"samples": 4, "model": {"weights": "abc"}}, order=METHODS)


@pytest.fixture(scope="module")
def table():
    """Two seeds of three methods at four grids; one cell failed, and one row altogether."""
    results = [result(method, spec, seed) for method in METHODS for spec in SPECS for seed in (0, 1)]
    results[1] = result("rtn", SPECS[0], 1, failed="MemoryError: <no> more")
    results[-2:] = [result(METHODS[2], SPECS[-1], seed, failed="ValueError: too | bad") for seed in (0, 1)]
    found = table_of(reversed(results))
    return replace(found, names={"model": "tiny <model>", "calibration": "a.txt", "held_out": "b.txt"})


def test_rows_are_means_over_seeds(table):
    rows = {(row.method, row.spec): row for row in table.rows()}
    assert len(rows) == 12
    row = rows["gptq", SPECS[0]]
    expected = 20 + 50 / 16 / 2
    assert row.values["perplexity"].mean == pytest.approx(expected + 0.5)
    assert row.values["perplexity"].deviation == pytest.approx(0.5**0.5)  # of two values one apart
    assert row.values["kl"].deviation == 0
    assert "peak_bytes" not in row.values
    half = rows["rtn", SPECS[0]]
    assert (half.seeds, half.values["perplexity"].deviation) == ((0,), None)
    assert half.failed == {1: "MemoryError: <no> more"}


def test_more_bits_come_first_and_methods_as_asked_for(table):
    found = [(row.method, row.spec) for row in table.rows()]
    assert found == [(method, spec) for spec in SPECS for method in METHODS]


def test_markdown(table):
    assert repr(table) == table._repr_markdown_() == table.markdown()
    lines = table.markdown().splitlines()
    header, _, floats, first = lines[:4]
    assert header.startswith("| method | grid | perplexity | KL to float | top-1 agreement | bits per weight | MB |")
    assert floats.startswith("| float |  | 20.000 | 0.0000 | 100.0% |  | 4.0 |")
    assert first == "| rtn | W4 g64 sym | 23.125 | 0.2500 | 50.0% | 4.250 | 1.0 | 10.0 | 1.0 |  |"
    assert "| gptq | W4 g64 sym | 22.062 ± 0.707 | 0.2500 |" in lines[4]
    assert lines[5].startswith(r"| mine <b>\|& |")
    rows = lines[: lines.index("")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {11}
    assert "- of 1 seed only: rtn (W4 g64 sym)." in lines
    assert "- rtn, W4 g64 sym, seed 1 failed: MemoryError: <no> more" in lines


def test_csv_and_json_hold_the_same(table):
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert (rows[0]["method"], float(rows[0]["perplexity"])) == ("float", 20)
    assert [row["method"] for row in rows[1:4]] == list(METHODS)
    assert rows[1]["failed"] == "seed 1: MemoryError: <no> more"
    assert (rows[2]["bits"], rows[2]["group_size"], rows[2]["symmetric"], rows[2]["seeds"]) == ("4", "64", "True", "2")
    data = json.loads(json.dumps(table.to_json()))
    assert [row["method"] for row in data["rows"]] == [row["method"] for row in rows[1:]]
    for row, line in zip(data["rows"], rows[1:], strict=True):
        for name, spread in row["values"].items():
            assert float(line[name]) == spread["mean"]
            assert line[f"{name}_deviation"] == ("" if spread["deviation"] is None else str(spread["deviation"]))
    assert [CellResult.from_json(cell) for cell in data["cells"]] == list(table.cells)


def test_a_number_that_is_not_finite_is_null_in_json(table):
    broken = result("rtn", SPECS[0], 0)
    lost = LayerError(path="layers.0.q", loss=float("inf"), rtn_loss=0.2, relative_error=float("nan"))
    data = table_of([replace(broken, figures=replace(broken.figures, layers=(lost,)))]).to_json()
    json.dumps(data, allow_nan=False)
    assert data["cells"][0]["figures"]["layers"][0] == {
        "path": "layers.0.q",
        "loss": None,
        "rtn_loss": 0.2,
        "relative_error": None,
    }


class Page(HTMLParser):
    """What a page shows, and what it would fetch."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.cells, self.images = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.sources += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag == "img":
            self.images.append(named["src"])
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_the_page_needs_nothing_else(table):
    picture = b"\x89PNG not really"
    text = html_report(table, {"one.png": picture})
    page = Page(text)
    assert page.open == []  # every element is closed
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert [base64.b64decode(image.partition("base64,")[2]) for image in page.images] == [picture]
    assert "mine <b>|&" in page.cells  # escaped, and so shown as it is
    assert "failed: ValueError: too | bad" in page.cells
    assert "22.062 ± 0.707" in page.cells
    assert "tiny &lt;model&gt;" in text


def test_without_plots_no_matplotlib_is_needed(table, tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    write_report(table, tmp_path / "out", plots=False)
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {"table.md", "table.csv", "table.json", "report.html"}
    with pytest.raises(ImportError, match=r"pip install 'gptq-jax\[compare\]', or go without \(--no-plots\)"):
        write_report(table, tmp_path / "out")


def test_plots_show_every_row(table, tmp_path):
    pytest.importorskip("matplotlib")
    from gptq_jax.comparison import plots

    (axes,) = plots.perplexity_by_bits(table).axes
    drawn = {container.get_label(): container.lines[0].get_xydata() for container in axes.containers}
    rows = [row for row in table.rows() if row.method == "gptq"]
    points = sorted((row.values["bits_per_weight"].mean, row.values["perplexity"].mean) for row in rows)
    np.testing.assert_allclose(sorted(map(tuple, drawn["gptq"])), points)
    assert len(drawn["mine <b>|&"]) == 3  # the row that failed has no point

    (axes,) = plots.perplexity_by_time(table).axes
    colour = next(line.get_color() for line in axes.lines if line.get_label() == "rtn")
    points = [line for line in axes.lines if line.get_color() == colour and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in points] == [9.0] * 4  # compilation taken off
    shapes = {line.get_label(): line.get_marker() for line in axes.lines}
    assert [line.get_marker() for line in points] == [shapes[row.grid] for row in table.rows() if row.method == "rtn"]
    assert len({line.get_marker() for line in points}) == 4

    figure = plots.layer_errors(table, SPECS[0])
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert set(panels) == {"q", "down"}
    assert {line.get_label() for line in panels["q"].lines} == set(METHODS)
    assert list(panels["q"].lines[0].get_ydata()) == pytest.approx([0.025, 0.035, 0.045])

    write_report(table, tmp_path / "out")
    pictures = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.png")}
    by_grid = {f"layer_errors_w{bits}_{group}_sym.png" for bits in (4, 3) for group in ("g64", "column")}
    assert set(pictures) == {"perplexity_by_bits.png", "perplexity_by_time.png"} | by_grid
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert {base64.b64decode(image.partition("base64,")[2]) for image in page.images} == set(pictures.values())


def test_what_is_of_no_use_does_not_press_the_others_together(table):
    """Beyond twenty times the float model's perplexity, the figure stands above the axis."""
    pytest.importorskip("matplotlib")
    from gptq_jax.comparison import plots

    first, *others = table.cells
    lost = replace(first, figures=replace(first.figures, perplexity=456789.0))
    for draw in (plots.perplexity_by_bits, plots.perplexity_by_time):
        (axes,) = draw(replace(table, cells=(lost, *others))).axes
        assert axes.get_ylim()[1] == pytest.approx(20 * table.float_figures.perplexity)
        (text,) = axes.texts
        assert text.get_text().startswith("\u2191 ")
        (axes,) = draw(table).axes
        assert not axes.texts


def test_nothing_but_failures_is_still_a_report(tmp_path):
    table = table_of([result("rtn", SPECS[0], 0, failed="OSError")])
    write_report(table, tmp_path / "out")
    assert "| rtn | W4 g64 sym | failed |" in (tmp_path / "out" / "table.md").read_text()
    assert not list((tmp_path / "out").glob("*.png"))
