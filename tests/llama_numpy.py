"""A Llama block in float64 numpy, written from the paper's formulas: the oracle of what each layer is fed."""

import numpy as np


def block(weights, x, config, mask=None):
    """The inputs of the linear layers by path, and the residual stream after the block.

    Args:
        weights: path of a layer -> kernel [d_in, d_out], and the two norms' scales.
        x: [batch, time, d_model].
        config: as in config.json.
        mask: [batch, time], True for real tokens; None if all are.
    """
    batch, time, d_model = x.shape
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = d_model // heads
    inputs = {}

    def linear(path, value):
        inputs[path] = value
        return value @ weights[path]

    def norm(name, value):
        return value / np.sqrt((value**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def split(value):
        return value.reshape(batch, time, -1, head_dim).transpose(0, 2, 1, 3)

    def rotate(value):
        angle = np.arange(time)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
        angle = np.concatenate([angle, angle], axis=-1)
        turned = np.concatenate([-value[..., head_dim // 2 :], value[..., : head_dim // 2]], axis=-1)
        return value * np.cos(angle) + turned * np.sin(angle)

    fed = norm("input_layernorm", x)
    query = rotate(split(linear("self_attn.q_proj", fed)))
    key = rotate(split(linear("self_attn.k_proj", fed))).repeat(heads // kv_heads, axis=1)
    value = split(linear("self_attn.v_proj", fed)).repeat(heads // kv_heads, axis=1)
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(head_dim)
    allowed = np.tril(np.ones((time, time), bool))[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    scores = np.where(allowed, scores, -1e30)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    attended = (scores / scores.sum(-1, keepdims=True)) @ value
    x = x + linear("self_attn.o_proj", attended.transpose(0, 2, 1, 3).reshape(batch, time, -1))
    fed = norm("post_attention_layernorm", x)
    gate = linear("mlp.gate_proj", fed)
    return inputs, x + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", fed))
