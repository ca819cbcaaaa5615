from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from kernel_cases import inputs, packed

from pallas_kernels.api import quantized_matmul
from pallas_kernels.weight import check_weight, concatenate, describe


@pytest.mark.parametrize("grid", [{}, {"symmetric": False, "bits": 3}, {"symmetric": False, "real_zeros": True}])
def test_outputs_side_by_side(grid):
    cases = [packed_weights.make(50, d_out, group_size=16, seed=d_out, **grid) for d_out in (5, 3, 8)]
    whole = concatenate([packed(case) for case in cases])
    check_weight(whole)
    x = inputs(4, 50)
    y = np.split(np.asarray(quantized_matmul(jnp.array(x), whole)), [5, 8], axis=1)
    for part, case in zip(y, cases, strict=True):
        packed_weights.assert_product(part, x, case)


def test_the_same_order_of_inputs_is_kept():
    case = packed_weights.make(50, 5, group_size=16, permuted=True)
    whole = concatenate([packed(case), packed(case)])
    x = inputs(4, 50)
    for part in np.split(np.asarray(quantized_matmul(jnp.array(x), whole)), 2, axis=1):
        packed_weights.assert_product(part, x, case)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"d_in": 51}, r"weights\[1\] differs from weights\[0\] in d_in=51 \(not 50\): leave it apart"),
        ({"bits": 8}, r"in bits=8 \(not 4\)"),
        ({"group_size": 32}, r"in group_rows=32 \(not 16\)"),
        ({"symmetric": False}, "in the dtype or presence of zeros"),
        ({"permuted": True}, "in the dtype or presence of group_of_row"),
    ],
)
def test_other_grids_are_refused(grid, message):
    one = packed_weights.make(50, 5, group_size=16)
    other = packed_weights.make(**{"d_in": 50, "d_out": 5, "group_size": 16, **grid})
    with pytest.raises(ValueError, match=message):
        concatenate([packed(one), packed(other)])


def test_other_orders_and_dtypes_are_refused():
    one, other = (packed(packed_weights.make(50, 5, group_size=16, permuted=True, seed=seed)) for seed in (0, 1))
    with pytest.raises(ValueError, match="in group_of_row"):
        concatenate([one, other])
    with pytest.raises(ValueError, match="in the dtype or presence of scales"):
        concatenate([one, replace(one, scales=one.scales.astype(jnp.float16))])
    with pytest.raises(ValueError, match="weights is empty"):
        concatenate([])


def test_the_description_is_of_the_device_jax_computes_on():
    weight = packed(packed_weights.make(50, 5))
    problem = describe(weight, 3, jnp.bfloat16)
    assert (problem.platform, problem.capability, problem.device) == ("cpu", None, "cpu")
    assert describe(weight, 3, jnp.bfloat16, "gpu").platform == "gpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert describe(weight, 3, jnp.bfloat16) == problem
    assert replace(problem, platform="gpu", capability="9.0").device == "gpu 9.0"
    assert problem.experts is None
    assert describe(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), weight), 3, jnp.bfloat16).experts == 4
