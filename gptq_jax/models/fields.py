"""What a decoder is made of, as data."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from gptq_jax.models.attention import Scores
from gptq_jax.models.experts import Experts
from gptq_jax.models.hadamard import hadamard_factors
from gptq_jax.models.mlp import ACTIVATIONS, MLPS
from gptq_jax.models.names import Names
from gptq_jax.models.norms import NORMS
from gptq_jax.models.residuals import RESIDUALS
from gptq_jax.models.rope import Rope

QKV_LAYOUTS = ("separate", "concatenated", "per_head")
UNIFORM = "decoder"  # the kind of all blocks where they do not differ


@dataclass(frozen=True, kw_only=True)
class DecoderFields:
    """The shape of a decoder; hashable, so a static argument of jit. What is not said is Llama's.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by `num_heads // num_kv_heads` query heads.
        head_dim: width of a head; what of it is rotated is even.
        context_length: the longest sequence the model was made for.
        rope: the rotary embedding; None where positions are learned or ALiBi's.
        norm: a name in `NORMS`.
        norm_eps: added to the mean square, or the variance.
        residual: how a block is joined, a name in `RESIDUALS`.
        mlp: a name in `MLPS`.
        hidden_act: a name in `ACTIVATIONS`.
        qkv: "separate"; "concatenated", one layer whose outputs are all queries, all keys, all values; or "per_head",
            one layer whose outputs are query, key and value of one head after another.
        attention_bias: q, k and v have biases.
        output_bias: the projection after attention has one; None for the same as q, k and v.
        mlp_bias: the layers of the MLP have biases.
        rotated_down: the input of `down` is multiplied by a Hadamard matrix, which its kernel takes back.
        qk_norm: queries and keys are normalized head by head, before they are rotated.
        scores: what is made of products of queries and keys.
        sliding_window: a token attends to itself and `sliding_window - 1` before it; None for all before it.
        position_offset: the row of the table of learned positions that position 0 has; None where there is none.
        embedding_size: width of the table of tokens where it is not `hidden_size`; it is projected in and out.
        embedding_scale: what embedded tokens are multiplied by.
        embedding_norm: they are normalized.
        final_norm: there is a norm after the last block.
        tie_embeddings: the head is the embedding, transposed.
        head_bias: the head has a bias.
        logit_softcap: logits are squeezed into (-logit_softcap, logit_softcap), or not where it is None.
        experts: that stand in place of the MLP; None where there are none.
        layer_kinds: the kind of each block, by name; empty where all are alike.
        kinds: of each kind its name, and the fields in which its blocks differ, as pairs of name and value.
        names: where a checkpoint has each part.
        transposed: a checkpoint has the kernels of its blocks as [d_out, d_in].
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope: Rope | None = field(default_factory=Rope)
    norm: str = "rms"
    norm_eps: float = 1e-6
    residual: str = "sequential"
    mlp: str = "gated"
    hidden_act: str = "silu"
    qkv: str = "separate"
    attention_bias: bool = False
    output_bias: bool | None = None
    mlp_bias: bool = False
    rotated_down: bool = False
    qk_norm: bool = False
    scores: Scores = field(default_factory=Scores)
    sliding_window: int | None = None
    position_offset: int | None = None
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = True
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_softcap: float | None = None
    experts: Experts | None = None
    layer_kinds: tuple[str, ...] = ()
    kinds: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    names: Names = field(default_factory=Names)
    transposed: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: "
                "query heads share key heads evenly."
            )
        if self.rope is not None and (self.head_dim < 2 or self.rope.rotated(self.head_dim) % 2):
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary embedding turns pairs of the "
                f"{self.rope.rotated(self.head_dim)} values it rotates."
            )
        if self.rope is not None:
            self.rope.frequencies(self.head_dim)  # which refuses settings that do not fit
        for name, table in _CHOICES.items():
            if (value := getattr(self, name)) not in table:
                raise ValueError(f"{name}={value!r} is not supported: use one of {sorted(table)}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be positive, or None for full attention.")
        if self.qkv == "per_head" and self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must be num_heads={self.num_heads} where qkv='per_head'."
            )
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias=True needs a head of its own: tie_embeddings must be False.")
        if self.rotated_down and (reason := _not_rotated(self)) is not None:
            raise ValueError(
                f"rotated_down=True: the input of `down` cannot be rotated online, because {reason}: rotate without "
                "online=True, by --method hadamard_values on the command line."
            )
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"there are {len(self.layer_kinds)} layer_kinds for {self.num_layers} layers.")
        for name in set(self.layer_kinds):
            self.of_kind(name)  # each is checked as the whole is

    def layer_kind(self, index: int) -> str:
        """The kind of a block, by name; blocks of one kind share a compiled function."""
        return self.layer_kinds[index] if self.layer_kinds else UNIFORM

    def of_kind(self, kind: str) -> "DecoderFields":
        """The decoder whose blocks are all of one kind."""
        fields = dict(self.kinds).get(kind, ())
        return replace(self, layer_kinds=(), kinds=(), **dict(fields)) if fields else self


def _not_rotated(config: DecoderFields) -> str | None:
    if config.experts is not None:
        return "each expert has one of its own"
    if hadamard_factors(config.intermediate_size) is None:
        return (
            f"no Hadamard matrix of its size {config.intermediate_size} is known here that is a product of small ones"
        )
    return None


_CHOICES: dict[str, Collection[str]] = {
    "norm": NORMS,
    "residual": RESIDUALS,
    "mlp": MLPS,
    "hidden_act": ACTIVATIONS,
    "qkv": QKV_LAYOUTS,
}
