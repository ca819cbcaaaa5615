"""Methods that break their promises are told which, before the long work."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from own_methods import clip_search
from tiny_quantization import BATCHES, float_model

from gptq_jax import Finish, QuantSpec, block_tuning, end_to_end_tuning, hadamard, pipeline
from gptq_jax.allocation import allocate_bits
from gptq_jax.methods import Solution, coordinate_descent, gptaq, gptq, hqq, qep, rtn
from gptq_jax.methods.contract import check_contract
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.pipeline import quantize

GRIDS = [QuantSpec(bits=3, group_size=size, symmetric=symmetric) for size in (-1, 24) for symmetric in (True, False)]


@pytest.mark.parametrize(
    "method", [rtn(), gptq(), gptaq(), qep(), qep(rtn()), coordinate_descent(), hqq(), clip_search()]
)
def test_methods_keep_theirs(method):
    check_contract(method, GRIDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": lambda d_in, d_out: "none"}, "of type str, but must return a pytree of arrays"),
        ({"init": lambda d_in, d_out: {"sum": 0.0}}, r"statistics\['sum'\] of type float"),
        ({"init": lambda d_in, d_out: jnp.ones(d_in)}, "not zeros"),
        ({"init": lambda d_in: jnp.ones(d_in)}, r"init\(8, 4\) failed: TypeError: .* takes 1 positional argument"),
        (
            {"update": lambda stats, batch: stats + jnp.sum(batch.x, axis=1)},
            r"inputs \[3, 8\], failed in test_contract.py, line \d+: TypeError",
        ),
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


def solving(change):
    """Round to nearest, but for what is wrong with the answer."""
    return rtn()._replace(name="mine", solve=lambda weight, stats, spec: change(round_to_nearest(weight, spec), weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensor, weight: weight,
            r"solve returned an array float32\[48, 96\], but must",
        ),
        (lambda tensor, weight: (tensor, {}), "solve returned tuple"),
        (lambda tensor, weight: Solution(tensor, 3), r"notes of an array int32\[\], but must return a dict"),
        (lambda tensor, weight: Solution(tensor, {"loss": weight}), r"the note 'loss' of an array float32\[48, 96\]"),
        (lambda tensor, weight: round_to_nearest(weight.T, tensor.spec), r"shape \(96, 48\), but must keep \(48, 96\)"),
        (lambda tensor, weight: round_to_nearest(weight, replace(tensor.spec, bits=2)), "on .*bits=2.* must keep .*=4"),
        (lambda tensor, weight: replace(tensor, codes=tensor.codes.astype("int32")), "codes are int32, not uint32"),
        (lambda tensor, weight: replace(tensor, codes=tensor.codes[1:]), r"codes has shape \(5, 96\)"),
        (lambda tensor, weight: replace(tensor, scales=tensor.scales[:1]), r"scales has shape \(1, 96\)"),
        (lambda tensor, weight: replace(tensor, scales=tensor.scales.astype("float32")), "scales of float32, but must"),
        (lambda tensor, weight: replace(tensor, zeros=None), "zeros has shape None"),
        (lambda tensor, weight: replace(tensor, zeros=tensor.zeros.astype("int32")), "zeros are int32, neither uint8"),
        (lambda tensor, weight: tensor if weight.max() > 0 else None, r"line \d+: TracerBoolConversionError"),
        (lambda tensor, weight: tensor.clipped, "failed in test_contract.py, .* no attribute 'clipped'"),
    ],
)
def test_a_solver_is_tried_by_shapes_before_the_work(change, message, monkeypatch):
    monkeypatch.setattr(pipeline, "_run", lambda *_, **__: pytest.fail("the work began"))
    spec = QuantSpec(group_size=24, symmetric=False)
    with pytest.raises(ValueError, match=f"^method 'mine': .*{message}"):
        quantize(float_model(layers=1), BATCHES, spec, solving(change))
    with pytest.raises(ValueError, match="method 'mine': "):
        allocate_bits(float_model(layers=1), BATCHES, 6.0, bits=(4, 8), spec=spec, method=solving(change))


@pytest.mark.parametrize("array", ["scales", "zeros"])
def test_values_are_looked_at_when_they_are_there(array):
    broken = solving(lambda tensor, weight: replace(tensor, **{array: tensor.scales * jnp.nan}))
    with pytest.raises(ValueError, match=f"method 'mine', for self_attn.q_proj, .*: {array} hold NaN or infinity"):
        quantize(float_model(layers=1), BATCHES, QuantSpec(group_size=24, symmetric=False), broken)


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_what_a_solver_refuses_is_told_in_its_own_words(error):
    def solve(weight, stats, spec):
        if spec.bits < 4:
            raise error("mine needs 4 bits")
        return round_to_nearest(weight, spec)

    picky = rtn()._replace(solve=solve)
    with pytest.raises(error, match="mine needs 4 bits"):
        quantize(float_model(layers=1), BATCHES, QuantSpec(bits=3, group_size=24), picky)
    check_contract(picky, [QuantSpec(bits=4)])


def test_what_is_no_method_is_told_how_to_become_one():
    for wrong, message in [
        (gptq, "method is gptq, not a gptq_jax.Method: call it"),
        ("gptq", "method is 'gptq', not a gptq_jax.Method: pass e.g. gptq"),
        (rtn()._replace(settings=[("a", 1)]), "unhashable type: 'list'; settings are pairs"),
    ]:
        with pytest.raises(TypeError, match=message):
            check_contract(wrong, [])


@pytest.mark.parametrize(
    ("part", "value"),
    [("rewrite", hadamard), ("tuning", block_tuning), ("finish", end_to_end_tuning), ("finish", block_tuning())],
)
def test_what_goes_with_a_method_is_of_its_kind(part, value):
    kind = {"rewrite": "Rewrite", "tuning": "Tuning", "finish": "Finish"}[part]
    with pytest.raises(TypeError, match=rf"method 'rtn' has a {part} that is .*, not a gptq_jax\.{kind}"):
        quantize(float_model(layers=1), BATCHES, method=rtn()._replace(**{part: value}))


def test_a_finish_that_forgets_the_report():
    broken = Finish(lambda model, quantized, report, batches: quantized, "mine")
    with pytest.raises(ValueError, match="finish 'mine': apply must return the model and its Report"):
        quantize(float_model(layers=1), BATCHES, QuantSpec(group_size=24), rtn()._replace(finish=broken))
