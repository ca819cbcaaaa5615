"""The product in plain XLA, a tile of inputs at a time: the float weight never exists as a whole.

For CPUs, and wherever memory matters more than speed. Works on the canonical layout, so it keeps no copy of
its own. Two regimes:

* one token: `sum(code * x)` is taken inside each packed word, in one fused loop, before anything is written.
  What is stored is one float a word (scaled, with `zero * sum(x)` taken off); a product with ones adds the
  words up. Faster than a float32 product, which has to read eight times as many bytes.
* several tokens, or groups that split a word: a tile of the weight is made float and multiplied, and the
  products of the tiles are added up.

No temporary made of weights is larger than `TILE_BYTES`, or than the floats of one run of codes where `d_out`
is so large that even these exceed it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels.packing import shortest_run, unpack
from pallas_kernels.weight import PackedWeight, Problem

TILE_BYTES = 2 << 20  # a core's second-level cache holds about half; smaller tiles pay for the loop

# (x, words, first row) -> the product of these inputs alone
TileProduct = Callable[
    [Float[Array, "tokens rows"], UInt32[Array, "words d_out"], Int32[Array, ""] | int],
    Float[Array, "tokens d_out"],
]


def check(problem: Problem) -> None:
    """Declines nothing: any bits, groups, order, tokens and platform."""


def matmul(x: Float[Array, "tokens d_in"], weight: PackedWeight) -> Float[Array, "tokens d_out"]:
    """`x @ weight`, summed in float32, in the dtype of `x`; differentiable in `x`, scales and real zeros."""
    product = _one_token if x.shape[0] == 1 and _words_within_groups(weight) else _tokens
    return product(x.astype(jnp.float32), weight).astype(x.dtype)


def _words_within_groups(weight: PackedWeight) -> bool:
    aligned = weight.group_rows % shortest_run(weight.bits)[0] == 0 or weight.groups == 1
    return aligned and weight.group_of_row is None


def _tokens(x: Float[Array, "tokens d_in"], weight: PackedWeight) -> Float[Array, "tokens d_out"]:
    def product(
        x: Float[Array, "tokens rows"], words: UInt32[Array, "words d_out"], first: Int32[Array, ""] | int
    ) -> Float[Array, "tokens d_out"]:
        rows = x.shape[1]
        codes = unpack(words, weight.bits, rows).astype(jnp.float32)
        if weight.group_of_row is None:
            groups = (first + jnp.arange(rows)) // weight.group_rows
        else:
            groups = jax.lax.dynamic_slice_in_dim(weight.group_of_row, first, rows)
        tile = (codes - _zeros(weight, groups)) * weight.scales[groups].astype(jnp.float32)
        return jnp.matmul(x, tile, precision="highest")

    # Two tiles at least: outside a loop XLA may make the tiles of all layers of a model float at once.
    return _sum_of_tiles(product, x, weight, floats_a_run=shortest_run(weight.bits)[0], least_tiles=2)


@jax.custom_jvp
def _one_token(x: Float[Array, "1 d_in"], weight: PackedWeight) -> Float[Array, "1 d_out"]:
    bits = weight.bits
    run_codes, run_words = shortest_run(bits)

    def product(
        x: Float[Array, "1 rows"], words: UInt32[Array, "words d_out"], first: Int32[Array, ""] | int
    ) -> Float[Array, "1 d_out"]:
        runs = -(-x.shape[1] // run_codes)
        inputs = jnp.pad(x[0], (0, runs * run_codes - x.shape[1])).reshape(runs, run_codes)
        words = jnp.pad(words, ((0, runs * run_words - words.shape[0]), (0, 0))).reshape(runs, run_words, -1)
        total = _sum_of_codes(words, inputs, bits)
        groups = (first + run_codes * jnp.arange(runs)) // weight.group_rows
        total = total - _zeros(weight, groups) * jnp.sum(inputs, axis=1)[:, None]
        total = total * weight.scales[groups].astype(jnp.float32)
        # A product, since XLA would fuse a sum with what it sums and then walk down the columns.
        return jnp.matmul(jnp.ones((1, runs)), total, precision="highest")

    return _sum_of_tiles(product, x, weight, floats_a_run=1, least_tiles=1)


@_one_token.defjvp
def _one_token_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    # The tangent through the tiles: linear in x, so that JAX transposes it, and recomputed, not stored.
    return _one_token(*primals), jax.jvp(_tokens, primals, tangents)[1]


def _sum_of_tiles(
    product: TileProduct,
    x: Float[Array, "tokens d_in"],
    weight: PackedWeight,
    floats_a_run: int,
    least_tiles: int,
) -> Float[Array, "tokens d_out"]:
    """Add `product` up over tiles of whole runs of codes, each of at most `TILE_BYTES` of floats."""
    run_codes, run_words = shortest_run(weight.bits)
    runs = weight.d_in // run_codes
    most = max(TILE_BYTES // (4 * floats_a_run * weight.d_out), 1)
    tile_runs = max(runs // max(-(-runs // most), least_tiles), 1)
    tiles = runs // tile_runs
    rows, words = tile_runs * run_codes, tile_runs * run_words
    # Zeros that need x: else XLA may set aside those of all layers of a model when it begins.
    zero = jnp.minimum(jnp.abs(jax.lax.stop_gradient(x[:, :1])), 0.0)
    total = jnp.broadcast_to(zero, (x.shape[0], weight.d_out))
    if tiles == 1:
        total = product(x[:, :rows], weight.codes[:words], 0)
    elif tiles > 1:

        @jax.checkpoint
        def add_tile(total, tile):  # type: ignore[no-untyped-def]
            return total + product(*tile), None

        tiled = (
            x[:, : tiles * rows].reshape(-1, tiles, rows).swapaxes(0, 1),
            weight.codes[: tiles * words].reshape(tiles, words, -1),
            jnp.arange(tiles, dtype=jnp.int32) * rows,
        )
        total, _ = jax.lax.scan(add_tile, total, tiled)
    if tiles * rows < weight.d_in:
        total = total + product(x[:, tiles * rows :], weight.codes[tiles * words :], tiles * rows)
    return total


def _sum_of_codes(
    words: UInt32[Array, "runs run_words d_out"], inputs: Float[Array, "runs run_codes"], bits: int
) -> Float[Array, "runs d_out"]:
    """`sum_k code[r, k, j] * inputs[r, k]`, a term a code, so that all fuse into one loop over words."""
    total = jnp.zeros(())
    for k in range(inputs.shape[1]):
        word, shift = divmod(k * bits, 32)
        code, factor = words[:, word], 1.0
        if shift + bits > 32:
            code = (code >> shift | words[:, word + 1] << (32 - shift)) & (2**bits - 1)
        elif shift + bits == 32:
            code = code >> shift
        else:  # leave the code where it is in the word, exact as a float too, and scale the input
            code, factor = code & ((2**bits - 1) << shift), 2.0**-shift
        total = total + code.astype(jnp.int32).astype(jnp.float32) * (inputs[:, k] * factor)[:, None]
    return total


def _zeros(weight: PackedWeight, groups: Int32[Array, "rows"]) -> Shaped[Array, "rows d_out"] | float:
    if weight.zeros is None:
        return 2.0 ** (weight.bits - 1)
    return weight.zeros[groups].astype(jnp.float32)
