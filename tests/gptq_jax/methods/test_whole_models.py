"""What every method and composition keeps on a whole model: quantized twice, stored, loaded and run.

A row has one of two grids, symmetric or not; the last group of every layer is short. Single layers on grids of all bits
are in test_methods.py. A new method, or a new way to put methods together, is a row.
"""

from dataclasses import replace
from functools import cache

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import build, floated
from own_methods import clip_search
from tiny_quantization import BATCHES, compilations, rounded

from gptq_jax import QuantSpec, block_tuning, end_to_end_tuning, learned_rounding, load, prepare, quantize, save
from gptq_jax.by_name import AROUND, FINISHES, make_method
from gptq_jax.methods import METHODS
from gptq_jax.rewrites import REWRITES
from gptq_jax.tensor import QuantizedTensor
from gptq_jax.tuning import TUNINGS

OWN = clip_search()  # made once, as its user would: made again it has other functions, which jit does not know
W2 = QuantSpec(bits=2, group_size=32, symmetric=False, scale_dtype="float16")
W3 = QuantSpec(bits=3, group_size=32, symmetric=True, scale_dtype="float16")
# All layers have 48 inputs, and two numbers of outputs once those of one input are joined: little to compile.
CONFIG = {**decoder_cases.CASES["tied_gqa"], "intermediate_size": 48, "num_hidden_layers": 1}
TUNED = {"tune": block_tuning(epochs=1), "autoround": learned_rounding(epochs=2)}
DISTILLED = end_to_end_tuning(epochs=8, rate=1e-2)


def named(name, **options):
    """As the command line makes it, anew each time; the tuning in front, if there is one, with few epochs."""
    first, _, rest = name.partition("+")
    if first == "distill":
        return make_method(rest, options)._replace(finish=DISTILLED)
    return make_method(rest, options)._replace(tuning=TUNED[first]) if first in TUNED else make_method(name, options)


ROWS = {
    "rtn": (W3, lambda: named("rtn")),
    "rtn mse": (W2, lambda: named("rtn", grid="mse")),
    "gptq": (W3, lambda: named("gptq")),
    "gptq natural": (W3, lambda: named("gptq", order="natural", grid="mse")),
    "gptq desc_act": (W2, lambda: named("gptq", static_groups=False, grid="minmax")),
    "gptq group": (W2, lambda: named("gptq", order="group", static_groups=False, grid="minmax")),
    "gptaq": (W2, lambda: named("gptaq")),
    "qep": (W2, lambda: named("qep")),
    "hqq": (W2, lambda: named("hqq")),
    "descent": (W3, lambda: named("descent")),
    "awq+rtn": (W3, lambda: named("awq+rtn")),
    "awq+gptq": (W3, lambda: named("awq+gptq")),
    "smooth+gptq": (W3, lambda: named("smooth+gptq")),
    "hadamard+gptq": (W3, lambda: named("hadamard+gptq")),
    "hadamard_values+gptq": (W3, lambda: named("hadamard_values+gptq")),
    "hadamard_online+gptq": (W2, lambda: named("hadamard_online+gptq")),
    "tune+fractions+rtn": (W2, lambda: named("tune+fractions+rtn")),
    "distill+rtn": (W2, lambda: named("distill+rtn")),
    "tune+qep": (W2, lambda: named("tune+qep")),
    "autoround": (W2, lambda: named("autoround+rtn")),
    "autoround+gptq": (W2, lambda: named("autoround+gptq")),
    "own": (W2, lambda: OWN),
}
TOKENS = np.concatenate(BATCHES)


def built():
    """The norms before layers let some channels through more than others, which is what AWQ and smoothing live by."""
    model = build(CONFIG)
    (block,) = model.params["layers"]
    gains = {"scale": jnp.geomspace(0.25, 4.0, 48)}
    block = {**block, "input_layernorm": gains, "post_attention_layernorm": gains}
    return replace(model, params={**model.params, "layers": [block]})


@cache
def model():
    return built()


@cache
def outputs(spec=None):
    """Of the float model, or of it rounded to nearest."""
    return model()(TOKENS) if spec is None else floated(rounded(model(), spec))(TOKENS)


def error(logits):
    return float(np.sum(np.square(logits - outputs())))


@pytest.mark.parametrize("row", ROWS)
def test_row(row, tmp_path):
    spec, make = ROWS[row]
    packed, report = quantize(model(), BATCHES, spec, make())
    logits = floated(packed)(TOKENS)
    assert {layer.method for layer in report.layers} == {make().name}
    check_error(row, spec, report, logits)
    check_second_run(packed, spec, make)
    check_store(packed, spec, logits, tmp_path / "out")


def check_error(row, spec, report, logits):
    """Neither a layer nor the model is worse than rounded to nearest; and whatever is not just that, is better."""
    assert all(layer.loss <= 1.001 * layer.rtn_loss for layer in report.layers)
    ratio = error(logits) / error(outputs(spec))
    assert ratio == pytest.approx(1.0, abs=1e-3) if row == "rtn" else ratio < 0.95


def check_second_run(packed, spec, make):
    """The same bits, and nothing compiled."""
    with compilations() as compiled:
        again, _ = quantize(built(), BATCHES, spec, make())
    assert compiled == []
    for one, other in zip(jax.tree.leaves(packed.params), jax.tree.leaves(again.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def check_store(packed, spec, logits, path):
    """What was saved is loaded, on the grid that was asked for, and its packed products are those of its weights."""
    save(packed, path)
    found = load(path)
    for one, other in zip(jax.tree.leaves(packed.params), jax.tree.leaves(found.params), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    tensors = jax.tree.leaves(found.params["layers"], is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    assert [tensor.spec for tensor in tensors if isinstance(tensor, QuantizedTensor)] == [spec] * 7
    np.testing.assert_allclose(prepare(found)(TOKENS), logits, atol=1e-4)


def test_no_name_is_left_out():
    """All that the command line knows has a row, but for factors, which are stored beside the model (test_eora.py)."""
    parts = {part for row in ROWS for part in row.split(" ")[0].split("+")}
    assert parts >= {*METHODS, *AROUND, *REWRITES, *TUNINGS, *FINISHES} - {"eora"}
