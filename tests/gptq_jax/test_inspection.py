from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from tiny_quantization import float_model

from gptq_jax.inspection import inspect_model, inspection_table
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.report import LayerReport, Report
from gptq_jax.spec import QuantSpec
from gptq_jax.storage import save, store

SPEC = QuantSpec(bits=3, group_size=24, symmetric=False, scale_dtype="float16")
PATH = "layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A store of which one layer is quantized, as if its solver had failed."""
    model = float_model()
    block = model.params["layers"][1]
    tensor = round_to_nearest(block["mlp"]["down_proj"]["kernel"], SPEC)
    layers = [model.params["layers"][0], {**block, "mlp": {**block["mlp"], "down_proj": {"kernel": tensor}}}]
    layer = LayerReport(
        path=PATH,
        method="rtn",
        spec=SPEC,
        d_in=80,
        d_out=48,
        loss=0.125,
        rtn_loss=0.25,
        relative_error=0.01,
        damping=1.0,
        fell_back=True,
        tokens=10,
        seconds=0.0,
        nbytes=tensor.nbytes,
    )
    report = Report(layers=(layer,), kept_float={"embed": "a [lookup] table"}, settings={"method": "gptq"})
    model = replace(model, params={**model.params, "layers": layers}, report=report.to_json())
    path = tmp_path_factory.mktemp("inspection") / "out"
    save(model, path)
    found = inspect_model(str(path))
    assert found["bytes"] == store.tree_bytes(model.params)
    assert found["bits_per_weight"] == pytest.approx(tensor.bits_per_weight)
    return found


def test_layers(result):
    assert len(result["layers"]) == 14
    assert result["quantized_layers"] == 1
    assert result["settings"] == {"method": "gptq"}
    layers = {layer["path"]: layer for layer in result["layers"]}
    packed = layers[PATH]
    assert packed["shape"] == [80, 48]
    assert packed["spec"] == {"bits": 3, "group_size": 24, "symmetric": False}
    assert (packed["loss"], packed["rtn_loss"], packed["relative_error"]) == (0.125, 0.25, 0.01)
    assert packed["fell_back"] is True
    assert packed["method"] == "rtn"
    assert packed["implementations"]["reference"] == "runs"
    dense = layers["layers.0.mlp.down_proj"]
    assert dense["spec"] is None
    assert dense["bits_per_weight"] == 32
    assert dense["bytes"] == 80 * 48 * 4


def test_the_table_fits_80_columns_and_tells_all(result):
    file = StringIO()
    for part in inspection_table(result):
        if isinstance(part, str):
            file.write(part + "\n")
        else:
            Console(file=file, width=80).print(part)
    text = file.getvalue()
    assert "…" not in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["1.mlp.down_proj"])
    assert row.split()[1:7] == ["80x48", "W3", "g24", "asym", "1.25e-01", "0.0100"]
    assert len(row.rstrip()) <= 80
    assert f"could not be solved and were rounded to nearest: {PATH}" in text
    assert "left float (a [lookup] table): embed" in text
    assert "1 of 14 layers quantized" in text
    declined = {name for layer in result["layers"] for name, why in layer["implementations"].items() if why != "runs"}
    assert all(f"{name} declines: " in text for name in declined)


def test_inputs_that_are_rotated_as_the_model_runs_are_told(result, tmp_path):
    model = float_model(layers=1)
    source = {**model.source, "rotated_down": True}
    rotated = replace(model, config=replace(model.config, rotated_down=True), source=source)
    save(rotated, tmp_path / "out")
    found = inspect_model(str(tmp_path / "out"))
    assert (result["rotated_inputs"], found["rotated_inputs"]) == (None, "mlp.down_proj")
    line = "inputs of mlp.down_proj are rotated as the model runs (hadamard_online)"
    assert line in inspection_table(found)
    assert line not in inspection_table(result)


def test_nothing_is_read_but_the_descriptions(result, monkeypatch):
    monkeypatch.setattr(store, "load_store", lambda _: pytest.fail("the arrays were read"))
    assert inspect_model(result["model"]) == result


def test_missing_models_are_named():
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        inspect_model("nowhere")
