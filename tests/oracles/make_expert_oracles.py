"""Make tiny models with experts, and their logits, from torch and transformers.

    python tests/oracles/make_expert_oracles.py

Needs torch and transformers, in an environment of their own: the library does not use torch. Writes a directory for
each case into `experts/`, as transformers saves a model, with `oracle.npz` beside it. Made with torch 2.13.0 (CPU,
float32), transformers 5.23.0.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "experts"
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
CASES = {
    "mixtral": {"model_type": "mixtral", "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "head_dim": 12,
    },
    "qwen3_moe_mixed": {  # the first block is dense, and weights are normalized
        "model_type": "qwen3_moe",
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
}


@torch.no_grad()
def make(name: str, fields: dict) -> None:
    """Save one model and its logits."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**COMMON, **fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for key, value in model.named_parameters():
        if key.endswith("norm.weight"):
            value.copy_(1 + 0.2 * torch.randn_like(value))
        elif "embed" in key:
            value.copy_(torch.randn_like(value))
        else:  # large enough for routers to be decided and attention to choose
            value.copy_(1.5 * torch.randn_like(value) / value.shape[-1] ** 0.5)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (2, 24), dtype=np.int32)
    logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.savez_compressed(HERE / name / "oracle.npz", tokens=tokens, logits=logits)
    print(name, logits.shape, float(np.abs(logits).mean()))


if __name__ == "__main__":
    for case, case_fields in CASES.items():
        make(case, case_fields)
