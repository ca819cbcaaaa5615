import gc

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import build

from gptq_jax.block import _losses
from gptq_jax.methods.gptq import GPTQOptions, solve_layer
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.prepared import prepare
from gptq_jax.pipeline import quantize
from gptq_jax.planning.memory import measure_bytes, quantize_memory, run_memory, solve_bytes
from gptq_jax.planning.sizes import float_shapes, quantized_shapes
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage.store import tree_bytes

CONFIG = {**decoder_cases.CASES["untied_mha"], "hidden_size": 128, "intermediate_size": 512, "vocab_size": 96}
SPEC = QuantSpec(bits=4, group_size=48)


def temporaries(function, *arguments):
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("d_in", "d_out"), [(1024, 512), (1024, 4096)])
def test_solving_takes_what_xla_says(d_in, d_out):
    weight, hessian = (jax.ShapeDtypeStruct((d_in, width), jnp.float32) for width in (d_out, d_in))
    tensor = jax.eval_shape(lambda weight: round_to_nearest(weight, QuantSpec()), weight)
    # Newer compilers need less; no more than a tenth above the plan, nor a fifth below it.
    solving = temporaries(solve_layer, weight, hessian, QuantSpec(), GPTQOptions())
    assert 0.8 < solving / solve_bytes(d_in, d_out) < 1.1
    measuring = temporaries(_losses, QuantSpec(), weight, tensor, hessian)
    assert 0.9 < measuring / measure_bytes(d_in, d_out) < 1.1


@pytest.mark.parametrize("windows", [2, 40])
def test_what_is_held_while_quantizing_is_planned(windows):
    model = build({**CONFIG, "num_hidden_layers": 3})
    batches = [np.random.default_rng(i).integers(0, 96, (2, 64), dtype=np.int32) for i in range(windows // 2)]
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    held = []
    made, _ = quantize(
        model, batches, SPEC, on_layer=lambda *_: held.append(sum(array.nbytes for array in jax.live_arrays()) - before)
    )
    floats = float_shapes(model.config, "float32")
    packed = quantized_shapes(model.config, SpecRules(default=SPEC), "float32")
    assert tree_bytes(packed) == tree_bytes(made.params)
    planned = quantize_memory(model.config, floats, packed, samples=windows, length=64, batch_size=2, dtype="float32")
    # Layers are reported when they are solved, when the temporaries of solving and measuring are gone.
    assert planned.stage == "solve mlp.down_proj"
    temporary = max(solve_bytes(512, 128), measure_bytes(512, 128))
    assert max(held) == pytest.approx(planned.in_memory - tree_bytes(floats) - temporary, rel=0.05)


def test_a_prepared_model_takes_the_planned_memory():
    model = build({**CONFIG, "num_hidden_layers": 2})
    batches = [np.arange(48, dtype=np.int32).reshape(2, 24)]
    made, _ = quantize(model, batches, SPEC)
    packed = quantized_shapes(model.config, SpecRules(default=SPEC), "float32")
    planned = run_memory(model.config, packed, sequences=3, length=100, dtype="float32")
    arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(prepare(made).params)}
    assert planned.weights == pytest.approx(sum(arrays.values()), rel=0.05)
    caches = [model.config.init_cache(3, 256) for _ in range(2)]  # the least that generation makes room for
    assert planned.cache == tree_bytes(caches)
    assert planned.total == planned.weights + planned.cache + planned.activations


def test_one_block_does_not_grow_with_depth_nor_samples():
    def one_block(layers, samples):
        config = build({**CONFIG, "num_hidden_layers": layers}).config
        floats = float_shapes(config, "float32")
        packed = quantized_shapes(config, SpecRules(default=SPEC), "float32")
        return quantize_memory(config, floats, packed, samples=samples, length=64, batch_size=2, dtype="float32")

    shallow, deep, long = one_block(1, 8), one_block(4, 8), one_block(1, 64)
    assert shallow.block == deep.block == long.block
    assert shallow.total == deep.total < long.total
    assert shallow.in_memory < min(deep.in_memory, long.in_memory)
    assert shallow.block <= shallow.total <= shallow.in_memory
