"""The decoder of Llama 1/2/3, SmolLM2 and Mistral, in Flax NNX, with Hugging Face's names inside a block."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from gptq_jax.hooks.nnx import Params, parameters
from gptq_jax.models.attention import KVCache, cached_attention, causal_attention
from gptq_jax.models.experts import Experts, SparseMLP
from gptq_jax.models.rope import Rope, rotate

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so a static argument of jit.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by `num_heads // num_kv_heads` query heads.
        head_dim: width of a head, even.
        context_length: the longest sequence the model was made for.
        rope: the rotary embedding.
        rms_norm_eps: added to the mean square.
        hidden_act: a name in `ACTIVATIONS`.
        attention_bias: q, k, v and o have biases.
        mlp_bias: gate, up and down have biases.
        sliding_window: a token attends to itself and `sliding_window - 1` before it; None for all before it.
        tie_embeddings: the head is the embedding, transposed.
        qk_norm: the heads of queries and keys are normalized before they are rotated.
        experts: of sparse MLPs; None where all are dense.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope: Rope = field(default_factory=Rope)
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    tie_embeddings: bool = False
    qk_norm: bool = False
    experts: Experts | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: "
                "query heads share key heads evenly."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not supported: use one of {sorted(ACTIVATIONS)}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be positive, or None for full attention.")

    def layer_kind(self, index: int) -> str:
        """ "sparse" for a block with experts, otherwise "decoder"."""
        return "sparse" if self.experts is not None and index not in self.experts.dense_layers else "decoder"

    def abstract_embed(self) -> nnx.Module:
        """Tokens [batch, time] -> residual stream [batch, time, hidden_size]."""
        return nnx.eval_shape(lambda: Embedding(self.vocab_size, self.hidden_size, rngs=nnx.Rngs(0)))

    def abstract_block(self, kind: str) -> nnx.Module:
        """(x, positions, cache, mask) -> (residual stream, updated cache)."""
        return nnx.eval_shape(lambda: Block(self, sparse=kind == "sparse", rngs=nnx.Rngs(0)))

    def abstract_head(self) -> nnx.Module:
        """Residual stream -> float32 logits [batch, time, vocab_size]."""
        return nnx.eval_shape(lambda: Head(self, rngs=nnx.Rngs(0)))

    def abstract_params(self) -> Params:
        """The tree of a model's parameters, as float32 `jax.ShapeDtypeStruct`s."""
        head = parameters(self.abstract_head())
        head.pop("embed", None)  # tied: the head reads params["embed"]
        return {
            "embed": parameters(self.abstract_embed()),
            "layers": [parameters(self.abstract_block(self.layer_kind(i))) for i in range(self.num_layers)],
            "head": head,
        }

    def tensor_name(self, path: tuple[str | int, ...]) -> tuple[str, bool]:
        """The Hugging Face tensor of the leaf at `path`, and whether it is stored transposed."""
        if path in _OUTER_TENSORS:
            return _OUTER_TENSORS[path]
        suffix, transposed = _LEAF_SUFFIXES[str(path[-1])]
        module = ".".join(map(str, path[2:-1]))
        if self.experts is not None:
            module = self.experts.stored_name(module)
        return f"model.layers.{path[1]}.{module}.{suffix}", transposed

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> KVCache:
        """An empty cache of one block for sequences of up to `capacity` tokens."""
        heads = (batch, self.num_kv_heads)
        return KVCache(
            keys=jnp.zeros((*heads, self.head_dim, capacity), dtype),
            values=jnp.zeros((*heads, capacity, self.head_dim), dtype),
        )


_OUTER_TENSORS: dict[tuple[str | int, ...], tuple[str, bool]] = {
    ("embed", "embedding"): ("model.embed_tokens.weight", False),
    ("head", "norm", "scale"): ("model.norm.weight", False),
    ("head", "lm_head", "kernel"): ("lm_head.weight", True),
}
_LEAF_SUFFIXES = {"kernel": ("weight", True), "scale": ("weight", False), "bias": ("bias", False)}


class Embedding(nnx.Module):
    """A vector for each token. `nnx.Embed` fixes its dtype when made; this one has that of its parameters."""

    def __init__(self, vocab_size: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jnp.zeros((vocab_size, features)))

    def __call__(self, tokens: Int32[Array, "batch time"]) -> Float[Array, "batch time features"]:
        """The vectors of `tokens`."""
        return jnp.take(self.embedding[...], tokens, axis=0)

    def attend(self, x: Float[Array, "batch time features"]) -> Float[Array, "batch time vocab"]:
        """Float32 products of `x` with every vector."""
        return jnp.einsum("btd,vd->btv", x, self.embedding[...], preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 whatever the dtype of `x`."""

    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalize the last axis."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        return (x32 * inverse * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=config.attention_bias, rngs=rngs)
        self.config = config
        self.q_proj = linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = linear(config.num_heads * config.head_dim, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        positions: Int32[Array, "#batch time"],
        cache: KVCache | None,
        mask: Bool[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
        """Mix tokens; see `Architecture.abstract_block` and `run_block` for positions, cache and mask."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        query, key = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rotate(each, positions, self.config.rope) for each in (query, key))
        value = self.v_proj(x).reshape(heads)
        window = self.config.sliding_window
        if cache is None:
            attended = causal_attention(query, key, value, mask, window)
        else:
            attended, cache = cached_attention(query, key, value, cache, positions, window)
        return self.o_proj(attended.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=config.mlp_bias, rngs=rngs)
        self.activation = config.hidden_act
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        """Transform each token."""
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention, then MLP, each normalized before and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, sparse: bool = False, rngs: nnx.Rngs):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp: MLP | SparseMLP
        if sparse:
            assert config.experts is not None  # or there is no such kind
            self.mlp = SparseMLP(config.hidden_size, config.experts, ACTIVATIONS[config.hidden_act], rngs=rngs)
        else:
            self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        positions: Int32[Array, "#batch time"],
        cache: KVCache | None,
        mask: Bool[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
        """The residual stream after the block, and the updated cache."""
        attended, cache = self.self_attn(self.input_layernorm(x), positions, cache, mask)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Head(nnx.Module):
    """The last normalization and the projection to the vocabulary."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        if config.tie_embeddings:
            self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        else:
            linear = partial(nnx.Linear, use_bias=False, preferred_element_type=jnp.float32, rngs=rngs)
            self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.tied = config.tie_embeddings

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time vocab"]:
        """Float32 logits."""
        x = self.norm(x)
        if not self.tied and not isinstance(self.lm_head, nnx.Linear):
            x = x.astype(jnp.float32)  # a packed head answers in the dtype of its input
        return (self.embed.attend(x) if self.tied else self.lm_head(x)).astype(jnp.float32)
