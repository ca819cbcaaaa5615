"""Flax language models that others wrote, quantized unchanged: Linen of transformers 4, NNX of tunix."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptq_jax
from gptq_jax import QuantSpec, gptq, rtn

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1500)]

VOCAB, TIME = 96, 24
SIZES = {"num_layers": 2, "vocab_size": VOCAB, "embed_dim": 48, "hidden_dim": 96, "num_heads": 4, "head_dim": 12}
TOKENS = [jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (4, TIME)), jnp.int32) for seed in range(2)]
POSITIONS = jnp.broadcast_to(jnp.arange(TIME, dtype=jnp.int32), (4, TIME))


@pytest.fixture(autouse=True)
def as_their_users_do():
    """They rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def transformers(name):
    """A Linen model of transformers, how it is called there, and how its module is."""
    if importlib.util.find_spec("transformers.models.gpt2.modeling_flax_gpt2") is None:
        pytest.skip("no transformers 4: tests/peers/requirements-modules.txt lists what is needed")
    from transformers import FlaxGPT2LMHeadModel, FlaxLlamaForCausalLM, GPT2Config, LlamaConfig

    if name == "gpt2":
        theirs = FlaxGPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64), seed=0
        )
    else:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        theirs = FlaxLlamaForCausalLM(config, seed=0)
    model = gptq_jax.adapt(theirs.module, theirs.params, blocks={"gpt2": "h", "llama": "layers"}[name])
    return model, lambda tokens: theirs(tokens).logits, lambda tokens: (tokens, jnp.ones_like(tokens), POSITIONS)


def tunix(name):
    """An NNX model of tunix with random weights (some of its own are zero at first), and how it is called."""
    if importlib.util.find_spec("tunix") is None:
        pytest.skip("no tunix: tests/peers/requirements-modules.txt lists what is needed")
    from flax import nnx

    family = importlib.import_module(f"tunix.models.{name}.model")
    if name == "gemma3":
        sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
        config = family.ModelConfig(**sizes, num_embed=VOCAB, num_kv_heads=2, sliding_window_size=8)
        theirs = family.Gemma3(config, rngs=nnx.Rngs(0))
    else:
        config = family.ModelConfig(**SIZES, num_kv_heads=2, rope_theta=10000, norm_eps=1e-5)
        theirs = getattr(family, {"llama3": "Llama3", "qwen3": "Qwen3"}[name])(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def drawn(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.15 + (leaf.ndim == 1), jnp.float32)

    nnx.update(theirs, jax.tree.map(drawn, nnx.state(theirs, nnx.Param)))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((TIME, TIME), bool)), (4, TIME, TIME))
    arguments = lambda tokens: (tokens, POSITIONS, None, causal)  # noqa: E731
    return gptq_jax.adapt(theirs, blocks="layers"), lambda tokens: theirs(*arguments(tokens))[0], arguments


CASES = [
    (transformers, "gpt2", 4, "the weight of a product too"),
    (transformers, "llama", 7, "looked up by index"),
    (tunix, "llama3", 7, "looked up by index"),
    (tunix, "qwen3", 7, "looked up by index"),
    (tunix, "gemma3", 6, "the weight of a product too"),
]


@pytest.mark.parametrize(("make", "name", "layers", "embedding"), CASES, ids=[case[1] for case in CASES])
def test_quantized_unchanged(make, name, layers, embedding, tmp_path):
    model, run, arguments = make(name)

    def logits(ours):
        out = ours(*arguments(TOKENS[0]))
        return np.asarray(out[0] if make is tunix else out.logits, np.float32)

    expected = np.asarray(run(TOKENS[0]), np.float32)
    # Gemma 3 of tunix computes in bfloat16.
    assert np.linalg.norm(logits(model) - expected) < (3e-2 if name == "gemma3" else 1e-4) * np.linalg.norm(expected)
    batches = [arguments(tokens) for tokens in TOKENS]
    spec = QuantSpec(bits=4, group_size=16)
    packed, report = gptq_jax.quantize(model, batches, spec, gptq())
    assert len(report.layers) == 2 * layers
    assert all(layer.loss < layer.rtn_loss for layer in report.layers)
    assert any(embedding in reason for reason in report.kept_float.values())
    rounded, _ = gptq_jax.quantize(model, batches, spec, rtn())
    assert np.linalg.norm(logits(packed) - expected) < np.linalg.norm(logits(rounded) - expected)
    gptq_jax.save(packed, tmp_path / "out")
    module = model.function.module if make is transformers else tunix_again(name)
    np.testing.assert_array_equal(logits(gptq_jax.load(tmp_path / "out", module=module)), logits(packed))


def tunix_again(name):
    """The module anew, with other weights: those of the directory count."""
    from flax import nnx

    model, _, _ = tunix(name)
    return nnx.merge(model.function.graph, nnx.State(_numbered(model.params)), model.state)


def _numbered(tree):
    from flax import nnx

    if not isinstance(tree, dict):
        return nnx.Param(jnp.zeros_like(tree))
    return {int(key) if key.isdigit() else key: _numbered(child) for key, child in tree.items()}
