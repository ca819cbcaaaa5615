import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest

from gptq_jax.matmul import explain, matmul, prepare
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.api import IMPLEMENTATIONS


def tensor(case: packed_weights.Case, group_size: int) -> QuantizedTensor:
    return QuantizedTensor(
        codes=jnp.array(case.codes),
        scales=jnp.array(case.scales),
        zeros=None if case.zeros is None else jnp.array(case.zeros),
        group_of_row=None if case.group_of_row is None else jnp.array(case.group_of_row),
        spec=QuantSpec(bits=case.bits, group_size=group_size, symmetric=case.zeros is None),
        d_in=case.weight.shape[0],
    )


@pytest.mark.parametrize("implementation", [None, "xla_tiled", "reference"])
@pytest.mark.parametrize("group_size", [-1, 32, 1000])
@pytest.mark.parametrize("batch", [(), (1, 1), (2, 5)])
def test_product(implementation: str | None, group_size: int, batch: tuple[int, ...]) -> None:
    permuted = group_size == 32
    case = packed_weights.make(100, 7, bits=3, group_size=group_size, symmetric=False, permuted=permuted)
    x = np.random.default_rng(1).normal(size=(*batch, 100)).astype(np.float32)
    y = matmul(jnp.array(x), tensor(case, group_size), implementation)
    assert y.shape == (*batch, 7)
    packed_weights.assert_product(y, x, case)


def test_the_dtype_is_that_of_x_and_sums_are_float32() -> None:
    case = packed_weights.make(4096, 3, group_size=128)
    x = jnp.full((2, 4096), 1.01, jnp.bfloat16)
    y = matmul(x, tensor(case, 128))
    assert y.dtype == jnp.bfloat16
    packed_weights.assert_product(np.asarray(y, np.float32), np.asarray(x, np.float32), case, eps=2.0**-8)


def test_prepared_on_a_cpu_keeps_the_arrays() -> None:
    case = packed_weights.make(64, 8, group_size=32)
    weight = tensor(case, 32)
    prepared = prepare(weight)
    for kept, given in zip(jax.tree.leaves(prepared), jax.tree.leaves(weight), strict=True):
        assert kept is given
    x = np.ones((2, 64), np.float32)
    packed_weights.assert_product(matmul(jnp.array(x), prepared), x, case)


def test_explain_needs_shapes_only() -> None:
    weight = QuantizedTensor(
        codes=jax.ShapeDtypeStruct((72, 192), jnp.uint32),
        scales=jax.ShapeDtypeStruct((5, 192), jnp.float16),
        zeros=None,
        group_of_row=None,
        spec=QuantSpec(),
        d_in=576,
    )
    answers = explain(weight)
    assert list(answers) == list(IMPLEMENTATIONS)
    assert {name for name, answer in answers.items() if answer == "runs"} == {"xla_tiled", "reference"}
    assert all(answers[name] for name in ("mosaic_hopper", "mosaic_ampere")), "a reason"
