import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from gptq_jax import terminal
from gptq_jax.report import LayerReport, Report, peak_memory, spec_label
from gptq_jax.spec import QuantSpec

LAYER = LayerReport(
    path="layers.123.self_attn.q_proj",
    method="gptq",
    spec=QuantSpec(bits=8, group_size=1024, symmetric=False, scale_dtype="float16"),
    d_in=4096,
    d_out=11008,
    loss=1.234567e-05,
    rtn_loss=2.5e-05,
    relative_error=0.1234,
    damping=0.01,
    fell_back=False,
    tokens=262144,
    seconds=123.456,
    nbytes=45_000_000,
)
FALLEN = replace(LAYER, path="layers.7.mlp.down_proj", method="rtn", damping=1.0, fell_back=True)
REPORT = Report(
    layers=(LAYER, FALLEN),
    kept_float={"embed": "a lookup table", "layers.0.mlp.up_proj": "skipped"},
    seconds={"forward": 3.0, "solve": 1.0},
    settings={"method": "gptq", "damping": 0.01},
    peak_bytes=123,
)


def render(*parts, width=80):
    file = StringIO()
    console = Console(file=file, width=width)
    for part in parts:
        console.print(part)
    return file.getvalue()


def test_json_round_trip(tmp_path):
    REPORT.write(str(tmp_path / "report.json"))
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == REPORT.to_json()
    assert Report.from_json(data) == REPORT
    assert data["layers"][0]["spec"] == {"bits": 8, "group_size": 1024, "symmetric": False, "scale_dtype": "float16"}


def test_totals():
    assert REPORT.fallbacks == ("layers.7.mlp.down_proj",)
    assert REPORT.loss == pytest.approx(2.469134e-05)
    assert REPORT.bits_per_weight == pytest.approx(8 * 45e6 / (4096 * 11008))


@pytest.mark.parametrize("grids", [1, 2])
def test_the_table_fits_80_columns_whole(grids):
    other = LAYER.spec if grids == 1 else QuantSpec(group_size=-1)
    text = render(replace(REPORT, layers=(LAYER, replace(FALLEN, spec=other))).table())
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    row, fallen = (line for line in text.splitlines() if "proj" in line)
    cells = ["123.self_attn.q_proj", "1.23e-05", "2.50e-05", "0.1234", "0.01", "123.46"]
    assert row.split()[: len(cells)] == cells
    assert ("0.49" in row) == (grids == 1)
    assert "rounded" in fallen
    assert ("W8 g1024 asym" in row, "W4 column sym" in fallen) == (grids == 2, grids == 2)


def test_labels():
    assert spec_label(QuantSpec()) == "W4 g128 sym"
    assert spec_label(QuantSpec(bits=3, group_size=-1, symmetric=False)) == "W3 column asym"


@pytest.mark.parametrize(
    ("damping", "asked", "raised"), [(0.1000000015, 0.1, False), (0.1, 0.01, True), (1e-6, 0.0, True), (None, 0, False)]
)
def test_the_summary_tells_raised_damping(monkeypatch, damping, asked, raised):
    file = StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=file, width=80))
    terminal.summarize(Report(layers=(replace(LAYER, damping=damping),), settings={"damping": asked}))
    assert ("damping was raised for layers.123.self_attn.q_proj" in file.getvalue()) == raised


def test_the_summary_is_whole(monkeypatch):
    file = StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=file, width=80))
    terminal.summarize(REPORT)
    text = file.getvalue()
    assert "…" not in text
    for part in ("left float (skipped): layers.0.mlp.up_proj", "rounded to nearest after all: layers.7.mlp.down_proj"):
        assert part in text
    assert "W8 g1024 asym: 7.984 bits per weight in 2 layers" in text
    row = next(line for line in text.splitlines() if "forward" in line)
    assert row.replace("│", " ").split() == ["forward", "3.0", "75%"]


def test_paths_are_shown_as_they_are(monkeypatch):
    file = StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=file, width=20))
    terminal.note("wrote /a/[bold]/long/directory/with/many/parts")
    assert file.getvalue() == "wrote /a/[bold]/long/directory/with/many/parts\n"


def test_peak_memory_is_that_of_a_process_with_jax_in_it():
    assert 50e6 < peak_memory() < 1e12
