from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest

from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor, split_outputs, validate


def make(permuted: bool = False, symmetric: bool = False) -> tuple[QuantizedTensor, packed_weights.Case]:
    case = packed_weights.make(100, 6, bits=4, group_size=32, symmetric=symmetric, permuted=permuted)
    tensor = QuantizedTensor(
        codes=jnp.array(case.codes),
        scales=jnp.array(case.scales),
        zeros=None if case.zeros is None else jnp.array(case.zeros),
        group_of_row=jnp.array(case.group_of_row) if permuted else None,
        spec=QuantSpec(group_size=32, symmetric=symmetric),
        d_in=100,
    )
    return tensor, case


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dequantize(permuted: bool, symmetric: bool) -> None:
    tensor, case = make(permuted, symmetric)
    np.testing.assert_allclose(tensor.dequantize(), case.weight, rtol=1e-6)
    assert tensor.dequantize("bfloat16").dtype == jnp.bfloat16
    validate(tensor)


def test_sizes() -> None:
    tensor, _ = make()
    assert tensor.shape == (100, 6)
    assert tensor.d_out == 6
    assert tensor.nbytes == 13 * 6 * 4 + 4 * 6 * 4 + 4 * 6
    assert tensor.bits_per_weight == 8 * tensor.nbytes / 600


def test_split_outputs() -> None:
    tensor, case = make(permuted=True)
    parts = split_outputs(tensor, [1, 3, 2])
    for part in parts:
        validate(part)
    whole = np.concatenate([part.dequantize() for part in parts], axis=1)
    np.testing.assert_allclose(whole, case.weight, rtol=1e-6)


def test_it_is_a_pytree_whose_shapes_can_be_evaluated() -> None:
    shapes = jax.eval_shape(lambda: make(permuted=True)[0])
    assert shapes.codes == jax.ShapeDtypeStruct((13, 6), jnp.uint32)
    assert shapes.spec == QuantSpec(group_size=32, symmetric=False)
    assert jax.tree.map(lambda leaf: None, shapes).scales is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"codes": jnp.zeros((12, 6), jnp.uint32)},
            r"layer 3: codes has shape \(12, 6\), .* needs \(13, 6\)",
        ),
        ({"scales": jnp.ones((3, 6))}, r"scales has shape \(3, 6\), .* needs \(4, 6\)"),
        ({"scales": jnp.full((4, 6), jnp.nan)}, "scales hold NaN or infinity"),
        ({"zeros": None}, "zeros has shape None"),
        ({"spec": QuantSpec(group_size=32)}, "zeros are stored, but the grid is symmetric"),
        ({"codes": jnp.zeros((13, 6), jnp.int32)}, "codes are int32, not uint32"),
        ({"group_of_row": jnp.zeros(99, jnp.int32)}, r"group_of_row has shape \(99,\)"),
        ({"group_of_row": jnp.full(100, 4, jnp.int32)}, r"group_of_row spans 4\.\.4, but there are 4 groups"),
    ],
)
def test_validate_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    tensor, _ = make()
    with pytest.raises(ValueError, match=message):
        validate(replace(tensor, **change), "layer 3")  # type: ignore[arg-type]
