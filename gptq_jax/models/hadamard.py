"""Hadamard matrices, and the product with one as a model runs: a few small products in place of a large one."""

from functools import lru_cache, reduce
from itertools import product

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LARGEST = 1024  # rows of a factor that is multiplied with as the model runs
_MOST_DOUBLINGS = 7  # in one factor


def hadamard_matrix(size: int) -> Float[np.ndarray, "size size"] | None:
    """A matrix of ones and minus ones with orthogonal rows, by Sylvester's doubling and Paley's two constructions."""
    found = _split(size)
    return None if found is None else np.kron(_sylvester(found[0]), _paley(found[1]))


@lru_cache
def hadamard_factors(size: int) -> tuple[Float[np.ndarray, "rows rows"], ...] | None:
    """Float32 matrices whose Kronecker product is `hadamard_matrix(size)`; None where one exceeds LARGEST rows."""
    found = _split(size)
    if found is None or found[1] > LARGEST:
        return None
    doublings, small = found
    count = -(-doublings // _MOST_DOUBLINGS)
    each = [doublings // count + (index < doublings % count) for index in range(count)]
    matrices = [*map(_sylvester, each), *([_paley(small)] if small > 1 or not each else [])]
    return tuple(matrix.astype(np.float32) for matrix in matrices)


def hadamard_transform(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """`x @ hadamard_matrix(d) / sqrt(d)`, an orthogonal product, in the dtype of `x`; sums are in float32.

    (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, stage 1b.)

    Raises:
        ValueError: `hadamard_factors` knows none for d.
    """
    d = x.shape[-1]
    factors = hadamard_factors(d)
    if factors is None:
        raise ValueError(f"x has {d} values in its last axis: no Hadamard matrix of this size is known in factors.")
    y = x.astype(jnp.float32) / jnp.float32(d**0.5)
    for matrix in factors:
        # The first of the factors' axes is contracted, and comes back as the last: after all, they are in order again.
        apart = y.reshape(*x.shape[:-1], len(matrix), -1)
        y = jnp.einsum("...nr,nm->...rm", apart, matrix, precision="highest").reshape(x.shape)
    return y.astype(x.dtype)


def _split(size: int) -> tuple[int, int] | None:
    """How often the smallest known matrix is doubled to have this size, and its size; None where none is known."""
    small, doublings = size, 0
    while small % 2 == 0:
        small, doublings = small // 2, doublings + 1
    while not _is_paleys(small) and doublings:
        small, doublings = 2 * small, doublings - 1
    return (doublings, small) if _is_paleys(small) else None


def _is_paleys(size: int) -> bool:
    return size == 1 or bool(_constructions(size))


def _constructions(size: int) -> list[tuple[int, bool, int]]:
    """Of Paley's constructions that give this size: degree of the field, whether it is the second, and the prime.

    A field of prime order comes first, then the first construction.
    """
    if size % 4:
        return []
    fields = [(_field(size - 1), False), *([(_field(size // 2 - 1), True)] if size % 8 == 4 else [])]
    return sorted((field[0], second, field[1]) for field, second in fields if field is not None)


def _field(order: int) -> tuple[int, int] | None:
    """Degree and prime where the order is a power of a prime."""
    if order < 2:
        return None
    prime = next((factor for factor in range(2, int(order**0.5) + 1) if order % factor == 0), order)
    degree = 1
    while prime**degree < order:
        degree += 1
    return (degree, prime) if prime**degree == order else None


def _sylvester(doublings: int) -> Float[np.ndarray, "rows rows"]:
    return reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * doublings, np.ones((1, 1)))


def _paley(size: int) -> Float[np.ndarray, "{size} {size}"]:
    if size == 1:
        return np.ones((1, 1))
    degree, second, prime = _constructions(size)[0]
    if not second:
        return np.eye(size) + _conference(degree, prime, -1.0)
    core = _conference(degree, prime, 1.0)
    return np.kron(core, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(size // 2), [[1.0, -1.0], [-1.0, -1.0]])


def _conference(degree: int, prime: int, border: float) -> Float[np.ndarray, "_ _"]:
    """Whether differences in the field are squares, 1 or -1, with a border of ones; border -1 makes it skew."""
    places = prime ** np.arange(degree)
    order = prime**degree
    character = np.full(order, -1.0)
    character[_squares(degree, prime) @ places] = 1.0
    character[0] = 0.0
    difference = np.zeros((order, order), np.int64)
    for place in places:  # polynomials are subtracted one coefficient at a time
        digit = np.arange(order) // place % prime
        difference += (digit[:, None] - digit[None]) % prime * place
    matrix = np.ones((order + 1, order + 1))
    matrix[1:, 0] = border
    matrix[0, 0] = 0.0
    matrix[1:, 1:] = character[difference]
    return matrix


def _squares(degree: int, prime: int) -> Int[np.ndarray, "_ {degree}"]:
    """The squares of a finite field but zero, as polynomials: the even powers of x, where all powers are the field."""
    one = (1,) + (0,) * (degree - 1)
    for top in product(range(prime), repeat=degree):  # what x to the degree is
        powers: list[tuple[int, ...]] = []
        power = one
        while len(powers) < prime**degree:
            powers.append(power)
            power = tuple((low + power[-1] * high) % prime for low, high in zip((0, *power[:-1]), top, strict=True))
            if power == one:
                break
        if len(powers) == prime**degree - 1:
            return np.array(powers[::2])
    raise AssertionError("every finite field has a primitive element")
