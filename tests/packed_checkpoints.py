"""Tiny packed checkpoints of random codes, written bit by bit, and the float weights they stand for."""

import json

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SHAPES = {  # [d_in, d_out]
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 64),
    "mlp.up_proj": (32, 64),
    "mlp.down_proj": (64, 32),
}
MODULES = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
HEAD = {"lm_head": (32, 64)}


def bit_stream(codes, bits):
    """Words of codes [count], by way of single bits."""
    single = (np.asarray(codes, np.uint32)[:, None] >> np.arange(bits, dtype=np.uint32)) & np.uint32(1)
    single = single.reshape(-1)
    padded = np.zeros(-(-single.size // 32) * 32, np.uint8)
    padded[: single.size] = single
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def columns(codes, bits):
    """Words of codes [count, columns], each column packed by itself."""
    return np.stack([bit_stream(column, bits) for column in np.asarray(codes).T], axis=1)


def random_module(rng, d_in, d_out, bits, group_size, symmetric, ordered=True):
    """Codes, true zero points, float16 scales, groups, and the float64 weight."""
    size = d_in if group_size == -1 else group_size
    group = np.arange(d_in) // size
    if not ordered:
        group = rng.permutation(group)
    groups = -(-d_in // size)
    codes = rng.integers(2**bits, size=(d_in, d_out))
    zeros = rng.integers(2**bits, size=(groups, d_out))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = rng.uniform(0.01, 0.03, (groups, d_out)).astype(np.float16)
    weight = (codes - zeros[group]) * scales.astype(np.float64)[group]
    return codes, zeros, scales, group, weight


def gptq_tensors(codes, zeros, scales, group, bits, version):
    """As GPTQModel stores them: v1 subtracts one from the true zero points."""
    stored = zeros - 1 if version == "gptq" else zeros
    words = columns(np.maximum(stored, 0).T, bits).T.astype(np.uint32)
    if version == "gptq" and bits != 3 and (zeros == 0).any():
        ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
        words = columns(zeros.T, bits).T - np.uint32(ones)
    return {
        "qweight": columns(codes, bits).view(np.int32),
        "qzeros": np.ascontiguousarray(words).view(np.int32),
        "scales": scales,
        "g_idx": group.astype(np.int32),
    }


def compressed_tensors(codes, zeros, scales, bits, symmetric):
    found = {
        "weight_packed": np.ascontiguousarray(columns(codes, bits).T).view(np.int32),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array(codes.T.shape, np.int64),
    }
    if not symmetric:
        found["weight_zero_point"] = np.ascontiguousarray(columns(zeros.T, bits)).view(np.int32)
    return found


def awq_tensors(codes, zeros, scales):
    def rows(values):
        """Each 8 outputs as one word, the even ones in its low half."""
        eights = values.reshape(len(values), -1, 8).astype(np.uint32)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return sum(eights[:, :, output] << np.uint32(4 * place) for place, output in enumerate(order)).view(np.int32)

    return {"qweight": rows(codes), "qzeros": rows(zeros), "scales": scales}


def quantization_config(form, bits, group_size, symmetric):
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    if form == "compressed-tensors":
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
        weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": form,
    }


def make(form="gptq_v2", bits=4, group_size=16, symmetric=False, *, ordered=True, modules=MODULES, seed=0):
    """The tensors of a checkpoint, its config, and the float64 weights [d_in, d_out] of the packed modules.

    Args:
        form: gptq, gptq_v2, compressed-tensors or awq.
        bits, group_size, symmetric: of every module.
        ordered: inputs of one group are neighbours.
        modules: the packed ones; others of the model are float16.
    """
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.normal(0, 1, (64, 32)).astype(np.float16),
        "model.norm.weight": np.ones(32, np.float16),
    }
    for layer in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = rng.uniform(0.5, 1.5, 32).astype(np.float16)
    weights = {}
    for module, (d_in, d_out) in {**MODULES, **HEAD}.items():
        codes, zeros, scales, group, weight = random_module(rng, d_in, d_out, bits, group_size, symmetric, ordered)
        if module not in modules:
            tensors[f"{module}.weight"] = np.ascontiguousarray(weight.T, np.float16)
            continue
        weights[module] = weight
        if form == "compressed-tensors":
            parts = compressed_tensors(codes, zeros, scales, bits, symmetric)
        elif form == "awq":
            parts = awq_tensors(codes, zeros, scales)
        else:
            parts = gptq_tensors(codes, zeros, scales, group, bits, form)
        tensors |= {f"{module}.{suffix}": values for suffix, values in parts.items()}
    config = {**CONFIG, "quantization_config": quantization_config(form, bits, group_size, symmetric)}
    return tensors, config, weights


def write(directory, tensors, config):
    directory.mkdir(exist_ok=True, parents=True)
    # safetensors writes an array's buffer whatever its strides are.
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory
