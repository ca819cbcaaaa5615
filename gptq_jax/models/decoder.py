"""A decoder as an `Architecture`: its modules by their shapes, and the tensor that each parameter is."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gptq_jax.hooks.nnx import Params, parameters
from gptq_jax.models.attention import KVCache
from gptq_jax.models.blocks import Block, Embedding, Head
from gptq_jax.models.experts import EXPERT
from gptq_jax.models.fields import DecoderFields

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_OUTER = {  # modules outside of the blocks, and the field of `Names` that has Hugging Face's name
    ("embed",): "embedding",
    ("embed", "positions"): "positions",
    ("embed", "norm"): "embedding_norm",
    ("embed", "project"): "project_in",
    ("head", "project"): "project_out",
    ("head", "norm"): "final_norm",
    ("head", "lm_head"): "head",
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(DecoderFields):
    """A decoder of any supported family."""

    def abstract_embed(self) -> nnx.Module:
        """(tokens, positions) [batch, time] -> residual stream [batch, time, hidden_size]."""
        return nnx.eval_shape(lambda: Embedding(self, rngs=nnx.Rngs(0)))

    def abstract_block(self, kind: str) -> nnx.Module:
        """(x, positions, cache, mask) -> (residual stream, updated cache)."""
        return nnx.eval_shape(lambda: Block(self.of_kind(kind), rngs=nnx.Rngs(0)))

    def abstract_head(self) -> nnx.Module:
        """Residual stream -> float32 logits [batch, time, vocab_size]."""
        return nnx.eval_shape(lambda: Head(self, rngs=nnx.Rngs(0)))

    def abstract_params(self) -> Params:
        """The tree of a model's parameters, as float32 `jax.ShapeDtypeStruct`s."""
        head = parameters(self.abstract_head())
        head.pop("embed", None)  # tied: the head reads params["embed"]
        blocks = {kind: parameters(self.abstract_block(kind)) for kind in {self.layer_kind(0), *self.layer_kinds}}
        return {
            "embed": parameters(self.abstract_embed()),
            "layers": [blocks[self.layer_kind(index)] for index in range(self.num_layers)],
            "head": head,
        }

    def tensor_name(self, path: tuple[str | int, ...]) -> tuple[str, bool]:
        """The Hugging Face tensor of the leaf at `path`, and whether it is stored transposed."""
        *module, leaf = path
        if module[0] == "layers":
            parts = [self.names.blocks, *map(str, module[1:])]
            if parts[-2] == "experts":
                parts.insert(-1, EXPERT)
            return f"{'.'.join(parts)}.{_LEAVES[str(leaf)]}", leaf == "kernel" and self.transposed
        return f"{getattr(self.names, _OUTER[tuple(map(str, module))])}.{_LEAVES[str(leaf)]}", leaf == "kernel"

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> KVCache:
        """An empty cache of one block for sequences of up to `capacity` tokens."""
        heads = (batch, self.num_kv_heads)
        return KVCache(
            keys=jnp.zeros((*heads, self.head_dim, capacity), dtype),
            values=jnp.zeros((*heads, capacity, self.head_dim), dtype),
        )
