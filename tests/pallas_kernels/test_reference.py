import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest

from pallas_kernels import reference


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("zeros", ["symmetric", "integer", "real"])
@pytest.mark.parametrize(("d_in", "d_out", "group_size"), [(1, 1, -1), (100, 7, 32), (45, 1, 20)])
def test_dequantize(bits: int, permuted: bool, zeros: str, d_in: int, d_out: int, group_size: int) -> None:
    case = packed_weights.make(
        d_in,
        d_out,
        bits=bits,
        group_size=group_size,
        symmetric=zeros == "symmetric",
        real_zeros=zeros == "real",
        permuted=permuted,
    )
    weight = reference.dequantize(
        jnp.array(case.codes),
        jnp.array(case.scales),
        None if case.zeros is None else jnp.array(case.zeros),
        None if case.group_of_row is None else jnp.array(case.group_of_row),
        bits=bits,
        group_rows=case.group_rows,
        d_in=d_in,
    )
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, case.weight, rtol=1e-6, atol=1e-6)
