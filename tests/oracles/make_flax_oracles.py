"""Make the committed Flax checkpoints of transformers 4, and the logits its Flax models give with them.

    python tests/oracles/make_flax_oracles.py

Needs a transformers that still has Flax, in an environment of its own (Python 3.11):

    pip install transformers==4.49.0 jax==0.4.30 jaxlib==0.4.30 flax==0.8.5 'numpy<2' 'scipy<1.13'

Writes `flax/CASE/`, each by `save_pretrained` of a tiny model whose parameters are drawn from a seed, and
`flax/logits.npz`: float32 on a CPU, for the tokens that are stored beside them.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

HERE = Path(__file__).parent / "flax"
TIME, VOCAB = 16, 40
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
_OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}
_NEO = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "max_position_embeddings": 32,
}
# Class (Flax...), config class, its settings. Mistral's window covers the tokens: Flax's is one wider than torch's.
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama_sharded": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama_bfloat16": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama_safetensors": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": TIME}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 12}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt2_base": ("GPT2Model", "GPT2Config", _GPT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", _NEO),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
}


def drawn(params: dict) -> dict:
    """Parameters of the same shapes in which nothing is zero or one."""
    rng = np.random.default_rng(0)
    flat = flatten_dict(params)
    for path in sorted(flat):
        values = 0.25 * rng.standard_normal(flat[path].shape)
        norm = path[-1] in ("scale", "weight")
        flat[path] = jax.numpy.asarray(values + 1 if norm else values, np.float32)
    return unflatten_dict(flat)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, TIME), dtype=np.int32)
    results = {"tokens": tokens}
    for name, (model_class, config_class, settings) in CASES.items():
        config = getattr(transformers, config_class)(vocab_size=VOCAB, **settings)
        model = getattr(transformers, f"Flax{model_class}")(config, seed=0)
        params = drawn(model.params)  # variants of one family hold the same
        if name.endswith("_bfloat16"):
            params = model.to_bf16(params)
        options = {"llama_sharded": {"max_shard_size": "10KB"}, "llama_safetensors": {"safe_serialization": True}}
        model.save_pretrained(HERE / name, params=params, **options.get(name, {}))
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        params = jax.tree_util.tree_map(lambda leaf: leaf.astype(np.float32), params)
        output = model(tokens, params=params)
        if hasattr(output, "logits"):
            results[name] = np.asarray(output.logits)
            print(name, results[name].shape, float(np.abs(results[name]).mean()))
    np.savez_compressed(HERE / "logits.npz", **results)


if __name__ == "__main__":
    main()
