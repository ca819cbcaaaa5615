from dataclasses import asdict

from gptq_jax.report import LayerReport, Report
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.export.card import card

LAYER = LayerReport(
    path="layers.0.mlp.up_proj",
    method="gptq",
    spec=QuantSpec(group_size=64),
    d_in=64,
    d_out=32,
    loss=0.1,
    rtn_loss=0.2,
    relative_error=0.05,
    damping=0.01,
    fell_back=False,
    tokens=1000,
    seconds=0.5,
    nbytes=1088,
)


def report(**changes):
    other = LayerReport(**{**asdict(LAYER), "path": "layers.0.mlp.down_proj", "spec": LAYER.spec, **changes})
    return Report(
        layers=(LAYER, other),
        kept_float={"head": "the output head"},
        settings={"order": "activation", "method": "gptq", "model": "org/name", "calibration": "a|b.txt"},
    ).to_json()


def test_the_recipe():
    text = card(report(), "gptq", "tiny")
    assert text.startswith("---\nlibrary_name: transformers\ntags:\n- gptq-jax\n- gptq\n---\n\n# tiny\n")
    for row in (
        "| grid | 4 bits, groups of 64, symmetric (2 layers) |",
        "| model | org/name |",
        "| calibration | a\\|b.txt |",
        "| order | activation |",
        "| bits per weight of these layers | 4.250 |",
        "| left float | head |",
    ):
        assert row in text
    assert text.index("| model |") < text.index("| order |")
    assert "rounded to nearest" not in text
    assert "None was measured for this card." in text


def test_layers_that_could_not_be_solved_are_told():
    text = card(report(fell_back=True, spec=QuantSpec(bits=8, group_size=-1, symmetric=False)), "gptq_v2", "tiny")
    assert "| could not be solved and were rounded to nearest | layers.0.mlp.down_proj |" in text
    assert "| grid | 8 bits, one scale a column, asymmetric (1 layers) |" in text


def test_measured_perplexities():
    measured = {"model": "m", "text": "wikitext2", "length": 512, "windows": 40, "perplexity": 12.34567}
    compared = {**measured, "against": "org/name", "against_perplexity": 11.5, "kl_divergence": 0.0123}
    text = card(report(), "gptq", "tiny", [measured, compared])
    assert "| wikitext2 | 512 | 40 | 12.3457 |  |  |" in text
    assert "| wikitext2 | 512 | 40 | 12.3457 | 11.5000 (org/name) | 0.01230 |" in text
    assert "None was measured" not in text


def test_no_record():
    assert "No record of a quantization came with the model." in card(None, "float", "tiny")
