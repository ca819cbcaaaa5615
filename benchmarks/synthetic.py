"""Checkpoints of any size with random weights, as Hugging Face has them, written block by block."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 300
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 200


def write_llama(folder: Path, *, blocks: int, width: int, hidden: int, context: int = 2048) -> int:
    """A random Llama in bfloat16 with a byte-level tokenizer; the bytes of its weights.

    Args:
        folder: to make.
        blocks: a safetensors file each.
        width: of the residual stream; four heads.
        hidden: inner width of the MLP.
        context: the most tokens of a sequence.
    """
    generator = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.8 / shape[-1] ** 0.5)
        return values.astype(ml_dtypes.bfloat16)

    def norm() -> np.ndarray:
        return 1 + weight(width)

    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for index in range(blocks):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}self_attn.{name}_proj.weight": weight(width, width) for name in "qkvo"}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": weight(hidden, width) for name in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(width, hidden)
        tensors |= {f"{prefix}{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
        save(f"model-{index:05}.safetensors", tensors)
    save(
        "model-outer.safetensors", {"model.embed_tokens.weight": weight(VOCABULARY, width), "model.norm.weight": norm()}
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
