"""Language models as users write them in Flax, with nothing of this library in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, WIDTH, HEADS = 64, 32, 4


class LinenBlock(nn.Module):
    """Pre-norm attention of DenseGeneral layers, then an MLP; a carry and nothing scanned over."""

    @nn.compact
    def __call__(self, x, mask, train=False):
        h = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attn")(h, mask=mask)
        h = nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(x))
        h = nn.Dropout(0.1, deterministic=not train)(nn.gelu(h))
        return x + nn.Einsum((2 * WIDTH, WIDTH), "btf,fd->btd", name="down")(h), None


class LinenLM(nn.Module):
    """Tied embeddings; blocks one by one, or under remat and scan with their parameters stacked on axis 1."""

    layers: int = 2
    scan: bool = False

    @nn.compact
    def __call__(self, tokens, mask=None, train=False):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        x = embed(tokens)
        causal = nn.make_causal_mask(tokens, dtype=bool)
        mask = causal if mask is None else nn.combine_masks(causal, mask[:, None, None, :], dtype=bool)
        if self.scan:
            block = nn.scan(
                nn.remat(LinenBlock),
                variable_axes={"params": 1},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.layers,
            )
            x, _ = block(name="layers")(x, mask)
        else:
            for index in range(self.layers):
                x, _ = LinenBlock(name=f"layers_{index}")(x, mask, train)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class NnxAttention(nnx.Module):
    """Keys and values from one Einsum kernel [2, heads, d, head_dim]."""

    def __init__(self, rngs):
        size = WIDTH // HEADS
        self.q = nnx.LinearGeneral(WIDTH, (HEADS, size), rngs=rngs)
        self.kv = nnx.Einsum("bsd,ckdh->cbskh", (2, HEADS, WIDTH, size), rngs=rngs)
        self.o = nnx.Einsum("btnh,nhd->btd", (HEADS, size, WIDTH), (WIDTH,), rngs=rngs)

    def __call__(self, x):
        query, (key, value) = self.q(x), self.kv(x)
        scores = jnp.einsum("btnh,bsnh->bnts", query, key)
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        return self.o(jnp.einsum("bnts,bsnh->btnh", weights, value))


class NnxBlock(nnx.Module):
    """One linear layer is no layer at all: a bare parameter and `@`."""

    def __init__(self, rngs):
        self.attn = NnxAttention(rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Param(0.2 * jax.random.normal(rngs.params(), (2 * WIDTH, WIDTH)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.dropout(self.attn(self.norm(x)))
        return x + nnx.relu(self.up(x)) @ self.down[...]


class NnxLM(nnx.Module):
    """A head of its own; blocks in a list, or stacked under nnx.scan."""

    def __init__(self, layers=2, scan=False, *, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.scan = scan
        if scan:
            make = nnx.vmap(NnxBlock, in_axes=(0,), out_axes=0)
            self.layers = nnx.split_rngs(splits=layers)(make)(rngs)
        else:
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(layers)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        if self.scan:
            x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


def linen(**options):
    """The module and its parameters."""
    module = LinenLM(**options)
    return module, module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def in_nnx(**options):
    """The module, its dropout off."""
    module = NnxLM(**options, rngs=nnx.Rngs(0))
    module.eval()
    return module
