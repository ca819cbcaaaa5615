"""Hadamard matrices and the product with one in small factors, against numpy in float64."""

from functools import reduce

import jax.numpy as jnp
import numpy as np
import pytest

from gptq_jax.models.hadamard import hadamard_factors, hadamard_matrix, hadamard_transform
from gptq_jax.models.registry import architecture_from_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 92,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


def dense(doublings: int, prime: int) -> np.ndarray:
    """Sylvester's matrix by common bits of row and column, times Paley's of `prime` + 1 by its quadratic residues."""
    each = np.arange(2**doublings)
    sylvester = 1.0 - 2.0 * (np.bitwise_count(each[:, None] & each[None]) % 2)
    residues = {number * number % prime for number in range(1, prime)}
    paley = np.eye(prime + 1)
    paley[0, 1:], paley[1:, 0] = 1.0, -1.0
    for row in range(prime):
        for column in range(prime):
            if row != column:
                paley[row + 1, column + 1] = 1.0 if (row - column) % prime in residues else -1.0
    return np.kron(sylvester, paley)


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 48, 52, 60, 100, 244, 576, 896, 960])
def test_hadamard_matrices_are_hadamards(size):
    """52, 100 and 244 by fields of 25, 49 and 243 elements."""
    found = hadamard_matrix(size)
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, size * np.eye(size))


@pytest.mark.parametrize(
    ("size", "rows"),
    [(1, [1]), (2, [2]), (12, [12]), (96, [8, 12]), (576, [16, 36]), (1536, [128, 12]), (512, [32, 16])],
)
def test_factors_multiply_to_the_matrix(size, rows):
    found = hadamard_factors(size)
    assert [len(matrix) for matrix in found] == rows
    np.testing.assert_array_equal(reduce(np.kron, found), hadamard_matrix(size))


@pytest.mark.parametrize("size", [4864, 8192, 11008, 13824, 14336, 18944, 28672, 29568, 53248])
def test_inner_sizes_of_published_models_come_apart(size):
    found = hadamard_factors(size)
    assert np.prod([len(matrix) for matrix in found]) == size
    for matrix in found:
        np.testing.assert_array_equal(matrix @ matrix.T, len(matrix) * np.eye(len(matrix)))


@pytest.mark.parametrize("size", [9, 6, 92, 1996])
def test_other_sizes_are_refused_by_name(size):
    """91 and 45 are no powers of primes; 997 is a prime, but a matrix of 1996 rows is not small."""
    assert hadamard_factors(size) is None
    with pytest.raises(ValueError, match=f"x has {size} values"):
        hadamard_transform(jnp.zeros((2, size)))


@pytest.mark.parametrize(("size", "made_of"), [(1536, (7, 11)), (80, (2, 19))])
def test_the_product_is_that_with_the_dense_matrix(size, made_of):
    x = np.random.default_rng(size).normal(size=(2, 3, size))
    expected = x @ dense(*made_of) / np.sqrt(size)
    np.testing.assert_allclose(hadamard_transform(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


def test_bfloat16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 48)), jnp.bfloat16)
    found = hadamard_transform(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, hadamard_transform(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_a_config_says_that_inputs_are_rotated():
    known = {**LLAMA, "intermediate_size": 48}
    assert not architecture_from_config(known).rotated_down
    assert architecture_from_config({**known, "rotated_down": True}).rotated_down
    with pytest.raises(ValueError, match="rotated_down=1 is not true or false"):
        architecture_from_config({**known, "rotated_down": 1})
    with pytest.raises(ValueError, match="no Hadamard matrix of its size 92 is known"):
        architecture_from_config({**LLAMA, "rotated_down": True})
