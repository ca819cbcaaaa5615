"""Methods that break their promises are told which, before the long work."""

import jax.numpy as jnp
import pytest
from own_methods import clip_search
from tiny_quantization import BATCHES, float_model

from gptq_jax.methods import coordinate_descent, gptaq, gptq, hqq, qep, rtn
from gptq_jax.methods.contract import check_statistics
from gptq_jax.pipeline import quantize


@pytest.mark.parametrize(
    "method", [rtn(), gptq(), gptaq(), qep(), qep(rtn()), coordinate_descent(), hqq(), clip_search()]
)
def test_methods_keep_theirs(method):
    check_statistics(method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": lambda d_in, d_out: "none"}, "of type str, but must return a pytree of arrays"),
        ({"init": lambda d_in, d_out: {"sum": 0.0}}, r"statistics\['sum'\] of type float"),
        ({"init": lambda d_in, d_out: jnp.ones(d_in)}, "not zeros"),
        ({"update": lambda stats, batch: (stats, batch.x)}, r"update returned statistics of .*float32\[3, 8\]"),
        ({"update": lambda stats, batch: stats.astype(jnp.float16)}, r"must keep the float32\[8\] of init"),
        ({"update": lambda stats, batch: jnp.mean(batch.x**2, axis=0)}, "update must add to its statistics"),
        ({"update": lambda stats, batch: jnp.maximum(stats, jnp.max(batch.x, axis=0))}, "update must add"),
    ],
)
def test_broken_promises_are_named_before_the_work(change, message):
    broken = clip_search()._replace(name="mine", **change)
    with pytest.raises(ValueError, match=f"method 'mine': .*{message}"):
        quantize(float_model(layers=1), BATCHES, method=broken)
