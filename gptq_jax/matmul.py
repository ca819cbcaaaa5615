"""x @ QuantizedTensor, by whichever implementation runs here."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from gptq_jax.tensor import QuantizedTensor
from pallas_kernels import api, grouped, sharded
from pallas_kernels.sharded import ShardedWeight
from pallas_kernels.weight import PackedWeight, describe

Prepared = api.PreparedWeight | ShardedWeight


def matmul(
    x: Shaped[Array, "*batch d_in"],
    weight: QuantizedTensor | Prepared,
    implementation: str | None = None,
    bias: Float[Array, "d_out"] | None = None,
) -> Float[Array, "*batch d_out"]:
    """`x @ weight + bias`, summed in float32, in the dtype of `x` (float32, bfloat16 or float16).

    Args:
        x: activations with any leading dimensions.
        weight: one weight, as it is or prepared; for stacked ones see `grouped_matmul`.
        implementation: a name in `pallas_kernels.api.IMPLEMENTATIONS`; None for the first that runs here.
        bias: added after the product, in its dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: see `pallas_kernels.api.quantized_matmul`.
    """
    if isinstance(weight, ShardedWeight):
        (y,) = sharded.quantized_matmul(x, weight, implementation)
        return y if bias is None else y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))
    packed = weight if isinstance(weight, api.PreparedWeight) else packed_weight(weight)
    return api.quantized_matmul(x, packed, implementation, bias)


def fused_matmul(
    x: Shaped[Array, "*batch d_in"], weight: Prepared, sizes: Sequence[int]
) -> list[Float[Array, "*batch _"]]:
    """The products of `x` with weights that were prepared as one, of `sizes` outputs."""
    if isinstance(weight, ShardedWeight):
        return sharded.quantized_matmul(x, weight, sizes=sizes)
    return _apart(matmul(x, weight), sizes)


def grouped_matmul(
    x: Float[Array, "rows d_in"],
    weight: Float[Array, "experts d_in d_out"] | QuantizedTensor | Prepared,
    group_sizes: Int32[Array, "experts"],
    implementation: str | None = None,
) -> Float[Array, "rows d_out"]:
    """Each row of `x` times the weight of its expert, in the dtype of `x`.

    Args:
        x: sorted by expert.
        weight: stacked, with a leading dimension of experts: float, packed or prepared.
        group_sizes: rows of each expert, which come one after another.
        implementation: of a packed weight, as for `matmul`.

    Raises:
        TypeError, ValueError, NotImplementedError: see `pallas_kernels.api.grouped_matmul`.
    """
    if isinstance(weight, jax.Array):
        # XLA's ragged product on a CPU multiplies every row with every expert.
        return jax.lax.platform_dependent(x, weight, group_sizes, cpu=_by_blocks, default=jax.lax.ragged_dot)
    if isinstance(weight, ShardedWeight):
        return sharded.grouped_matmul(x, weight, group_sizes, implementation)[0]
    packed = weight if isinstance(weight, api.PreparedWeight) else packed_weight(weight)
    return api.grouped_matmul(x, packed, group_sizes, implementation)


def fused_grouped_matmul(
    x: Float[Array, "rows d_in"], weight: Prepared, group_sizes: Int32[Array, "experts"], sizes: Sequence[int]
) -> list[Float[Array, "rows _"]]:
    """`grouped_matmul` with stacks that were prepared as one, of `sizes` outputs."""
    if isinstance(weight, ShardedWeight):
        return sharded.grouped_matmul(x, weight, group_sizes, sizes=sizes)
    return _apart(grouped_matmul(x, weight, group_sizes), sizes)


def _apart(y: Float[Array, "*batch d_out"], sizes: Sequence[int]) -> list[Float[Array, "*batch _"]]:
    return jnp.split(y, list(accumulate(sizes))[:-1], axis=-1)


def _by_blocks(
    x: Float[Array, "rows d_in"], weight: Float[Array, "experts d_in d_out"], group_sizes: Int32[Array, "experts"]
) -> Float[Array, "rows d_out"]:
    return grouped.in_a_loop(x, weight, group_sizes, jnp.matmul, weight.shape[-1])


def prepare(
    weight: QuantizedTensor, implementation: str | None = None, x_dtype: Any = jnp.float32
) -> api.PreparedWeight:
    """The weight in the layout of the implementation that will run it; on a CPU the same arrays, uncopied."""
    return api.prepare(packed_weight(weight), implementation, x_dtype)


def explain(
    weight: QuantizedTensor, tokens: int = 1, x_dtype: Any = jnp.float32, platform: str | None = None
) -> dict[str, str]:
    """For each implementation, in the order tried: "runs", or why it declines. Needs shapes and dtypes only.

    Args:
        weight: its arrays may be `jax.ShapeDtypeStruct`s.
        tokens: rows of `x`.
        x_dtype: the dtype of `x`.
        platform: "cpu", "gpu" or "tpu"; None for where JAX runs.
    """
    return api.explain(describe(packed_weight(weight), tokens, x_dtype, platform))


def is_packed(value: Any) -> bool:
    """Whether it is a packed weight, as it is stored or prepared to run."""
    return isinstance(value, QuantizedTensor | Prepared)


def holds_prepared(params: Any) -> bool:
    """Whether any weight in a tree of parameters is prepared to run here."""
    leaves = jax.tree.leaves(params, is_leaf=is_packed)
    return any(isinstance(leaf, Prepared) for leaf in leaves)


def packed_weight(tensor: QuantizedTensor) -> PackedWeight:
    """The same arrays as `pallas_kernels` takes them."""
    return PackedWeight(
        codes=tensor.codes,
        scales=tensor.scales,
        zeros=tensor.zeros,
        group_of_row=tensor.group_of_row,
        bits=tensor.spec.bits,
        group_rows=tensor.spec.group_rows(tensor.d_in),
        d_in=tensor.d_in,
    )
