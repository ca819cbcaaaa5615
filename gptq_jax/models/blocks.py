"""The modules of a decoder in Flax NNX: embedding, block and head, built from its fields."""

from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from gptq_jax.models.attention import KVCache, cached_attention, causal_attention
from gptq_jax.models.experts import by_experts, expert_layers
from gptq_jax.models.fields import DecoderFields
from gptq_jax.models.hadamard import hadamard_transform
from gptq_jax.models.mlp import ACTIVATIONS, MLPS
from gptq_jax.models.norms import NORMS
from gptq_jax.models.residuals import RESIDUALS
from gptq_jax.models.rope import rotate


class Table(nnx.Module):
    """A vector for each index. `nnx.Embed` fixes its dtype when made; this one has that of its parameters."""

    def __init__(self, rows: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jnp.zeros((rows, features)))

    def __call__(self, indices: Int32[Array, "batch time"]) -> Float[Array, "batch time features"]:
        """The vectors of `indices`."""
        return jnp.take(self.embedding[...], indices, axis=0)


class Embedding(nnx.Module):
    """Tokens, with what the family adds to them: a scale, a projection, learned positions, a norm."""

    def __init__(self, config: DecoderFields, *, rngs: nnx.Rngs):
        width = config.embedding_size or config.hidden_size
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, width)))
        self.config = config
        if width != config.hidden_size:
            self.project = nnx.Linear(width, config.hidden_size, use_bias=False, rngs=rngs)
        if config.position_offset is not None:
            self.positions = Table(config.context_length + config.position_offset, config.hidden_size, rngs=rngs)
        if config.embedding_norm:
            self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps, rngs=rngs)

    def __call__(
        self, tokens: Int32[Array, "batch time"], positions: Int32[Array, "#batch time"]
    ) -> Float[Array, "batch time hidden"]:
        """The residual stream of `tokens` at `positions`."""
        x = jnp.take(self.embedding[...], tokens, axis=0)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if hasattr(self, "project"):
            x = self.project(x)
        if self.config.position_offset is not None:
            # Padding of a chunk may lie beyond the table.
            rows = jnp.minimum(positions, self.config.context_length - 1) + self.config.position_offset
            x = x + jnp.broadcast_to(self.positions(rows), x.shape)
        return self.norm(x) if self.config.embedding_norm else x

    def attend(self, x: Float[Array, "batch time features"]) -> Float[Array, "batch time vocab"]:
        """Float32 products of `x` with the vector of every token."""
        return jnp.einsum("btd,vd->btv", x, self.embedding[...], preferred_element_type=jnp.float32)


class Group(nnx.Module):
    """Layers under one name, as a checkpoint has them."""


class Block(nnx.Module):
    """Attention and MLP, joined to the residual stream. Its layers are placed by the names of the checkpoint."""

    def __init__(self, config: DecoderFields, *, rngs: nnx.Rngs):
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        output_bias = config.attention_bias if config.output_bias is None else config.output_bias
        linear = partial(nnx.Linear, rngs=rngs)
        if config.qkv == "separate":
            for role, width in (("query", queries), ("key", keys), ("value", keys)):
                self._place(role, linear(hidden, width, use_bias=config.attention_bias))
        else:
            self._place("qkv", linear(hidden, queries + 2 * keys, use_bias=config.attention_bias))
        if config.qk_norm:
            for role in ("query_norm", "key_norm"):
                self._place(role, NORMS[config.norm](config.head_dim, config.norm_eps, rngs=rngs))
        self._place("output", linear(queries, hidden, use_bias=output_bias))
        if config.experts is not None:
            for role, layer in expert_layers(hidden, config.experts, rngs=rngs).items():
                self._place(role, layer)
        else:
            for role, shape in MLPS[config.mlp].layers(hidden, inner).items():
                self._place(role, linear(*shape, use_bias=config.mlp_bias))
        for role in RESIDUALS[config.residual].norms:
            self._place(role, NORMS[config.norm](hidden, config.norm_eps, rngs=rngs))

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        positions: Int32[Array, "#batch time"],
        cache: KVCache | None,
        mask: Bool[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
        """The residual stream after the block, and the updated cache; see `run_block` for positions and mask."""
        attend = partial(self._attend, positions=positions, cache=cache, mask=mask)
        transform = MLPS[self.config.mlp].transform if self.config.experts is None else by_experts
        mlp = partial(transform, self._part_of_mlp, ACTIVATIONS[self.config.hidden_act])
        return RESIDUALS[self.config.residual].join(x, self._part, attend, mlp)

    def _attend(
        self,
        x: Float[Array, "batch time hidden"],
        positions: Int32[Array, "#batch time"],
        cache: KVCache | None,
        mask: Bool[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
        config = self.config
        query, key, value = self._heads(x)
        if config.qk_norm:
            query, key = self._part("query_norm")(query), self._part("key_norm")(key)
        if config.rope is not None:
            length = x.shape[1] if cache is None else cache.values.shape[2]
            query, key = (rotate(part, positions, config.rope, length) for part in (query, key))
        if cache is None:
            attended = causal_attention(query, key, value, mask, config.sliding_window, config.scores)
        else:
            attended, cache = cached_attention(
                query, key, value, cache, positions, config.sliding_window, config.scores
            )
        return self._part("output")(attended.reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Float[Array, "batch time hidden"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each [batch, time, its heads, head_dim]."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        if self.config.qkv == "separate":
            query, key, value = (self._part(role)(x).reshape(heads) for role in ("query", "key", "value"))
            return query, key, value
        together = self._part("qkv")(x)
        if self.config.qkv == "per_head":
            by_head = together.reshape(*x.shape[:2], self.config.num_heads, 3, self.config.head_dim)
            return by_head[..., 0, :], by_head[..., 1, :], by_head[..., 2, :]
        queries, keys = self.config.num_heads, self.config.num_heads + self.config.num_kv_heads
        query, key, value = jnp.split(together.reshape(heads), (queries, keys), axis=2)
        return query, key, value

    def _place(self, role: str, layer: nnx.Module) -> None:
        *parents, name = getattr(self.config.names, role).split(".")
        here: Any = self
        for parent in parents:
            if not hasattr(here, parent):
                setattr(here, parent, Group())
            here = getattr(here, parent)
        setattr(here, name, layer)

    def _part(self, role: str) -> Any:
        """A layer by its role: whatever stands in its place when it is called."""
        return reduce(getattr, getattr(self.config.names, role).split("."), self)

    def _part_of_mlp(self, role: str) -> Any:
        layer = self._part(role)
        if role == "down" and self.config.rotated_down:
            return lambda x: layer(hadamard_transform(x))
        return layer


class Head(nnx.Module):
    """The last normalization and the projection to the vocabulary."""

    def __init__(self, config: DecoderFields, *, rngs: nnx.Rngs):
        self.config = config
        width = config.embedding_size or config.hidden_size
        if config.final_norm:
            self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps, rngs=rngs)
        if width != config.hidden_size:
            self.project = nnx.Linear(config.hidden_size, width, use_bias=False, rngs=rngs)
        if config.tie_embeddings:
            self.embed = Embedding(config, rngs=rngs)
        else:
            linear = partial(nnx.Linear, use_bias=config.head_bias, preferred_element_type=jnp.float32, rngs=rngs)
            self.lm_head = linear(width, config.vocab_size)

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time vocab"]:
        """Float32 logits."""
        config = self.config
        if config.final_norm:
            x = self.norm(x)
        if hasattr(self, "project"):
            x = self.project(x)
        if not config.tie_embeddings and not isinstance(self.lm_head, nnx.Linear):
            x = x.astype(jnp.float32)  # a packed head answers in the dtype of its input
        logits = (self.embed.attend(x) if config.tie_embeddings else self.lm_head(x)).astype(jnp.float32)
        if config.logit_softcap is not None:
            logits = jnp.tanh(logits / config.logit_softcap) * config.logit_softcap
        return logits
