"""Make the committed packed checkpoints with other tools, and what those tools make of them.

    TORCHDYNAMO_DISABLE=1 GPTQMODEL_CPU_WORKERS=2 python tests/oracles/make_packed_oracles.py gptq awq
    python tests/oracles/make_packed_oracles.py compressed-tensors

Each needs an environment of its own: GPTQModel 7.7.0 with torch 2.13.0 (CPU) for `gptq` and `awq`,
compressed-tensors 0.20.0 with torch 2.13.0 for the other; both with transformers 5.23.0. The library uses none of
them. The name of one checkpoint makes only that one. Writes `packed/NAME/`: a checkpoint of one layer, and `ref.npz`
with `tokens`, `logits` (float32, by transformers, of the weights the tool dequantized) and each of those weights as
[in, out] float16.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "packed"
VOCAB = 64
LINEARS = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
LINEARS += [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
# Name -> the model's config beyond the common one, and GPTQModel's settings.
GPTQ = {
    "gptq_v1_dynamic": (
        {"attention_bias": True},
        {
            "bits": 4,
            "group_size": 16,
            "desc_act": True,
            "sym": True,
            "format": "gptq",
            "lm_head": True,
            "dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": -1}, r"-:.*\.gate_proj": {}},
        },
    ),
    "gptq_v2_w2": ({"tie_word_embeddings": True}, {"bits": 2, "group_size": 16, "sym": False, "format": "gptq_v2"}),
    "gptq_v2_w3": (
        {"tie_word_embeddings": True, "num_key_value_heads": 2},  # it packs 3 bits only for multiples of 32
        {"bits": 3, "group_size": -1, "sym": False, "format": "gptq_v2", "act_group_aware": False},
    ),
    "gptq_v1_w8": ({"tie_word_embeddings": True}, {"bits": 8, "group_size": 32, "sym": True, "format": "gptq"}),
}
WIDE = {"tie_word_embeddings": True, "hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2}
AWQ = {"awq_gemm": (WIDE, {"bits": 4, "group_size": 32, "sym": False, "quant_method": "awq", "format": "gemm"})}
# Name -> the model's config, the scheme of the weights.
COMPRESSED = {
    "ct_w4_sym": ({"tie_word_embeddings": True}, {"num_bits": 4, "symmetric": True, "group_size": 16}),
    "ct_w4_asym": ({"tie_word_embeddings": True}, {"num_bits": 4, "symmetric": False, "group_size": 16}),
    "ct_w3_channel": ({"tie_word_embeddings": True}, {"num_bits": 3, "symmetric": False, "group_size": None}),
}


def llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"hidden_size": 32, "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False, **config}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            **config,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to(torch.float16)


@torch.no_grad()
def write_reference(directory: Path, model: LlamaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """`model` has the float parameters; `weights` are the dequantized ones, [out, in] float16."""
    state = model.state_dict()
    model = LlamaForCausalLM(model.config).float().eval()  # anew: `.half()` has rounded the rotary frequencies
    model.load_state_dict(state)
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight.float())
    tokens = torch.arange(32).reshape(2, 16) * 7 % VOCAB
    logits = model(tokens).logits
    found = {name: weight.T.contiguous().numpy() for name, weight in weights.items()}
    np.savez_compressed(directory / "ref.npz", tokens=tokens.numpy(), logits=logits.numpy(), **found)


def gptqmodel(name: str, config: dict, settings: dict) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    base, out = Path(tempfile.mkdtemp()), HERE / name
    llama(**config).save_pretrained(base)
    write_tokenizer(base)
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, VOCAB, (32, 64), generator=generator).tolist()
    calibration = [{"input_ids": window, "attention_mask": [1] * 64} for window in windows]
    model = GPTQModel.load(str(base), QuantizeConfig(**settings, offload_to_disk=False))
    model.quantize(calibration, batch_size=1, backend=BACKEND.AUTO if "awq" in name else BACKEND.TORCH)
    shutil.rmtree(out, ignore_errors=True)
    model.save(str(out))
    for file in out.iterdir():
        if file.name not in ("config.json", "quantize_config.json", "model.safetensors"):
            file.unlink()
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(out, copy, dirs_exist_ok=True)
        write_tokenizer(Path(copy))
        backend = BACKEND.TORCH_AWQ if "awq" in name else BACKEND.TORCH
        loaded = GPTQModel.load(copy, backend=backend, device="cpu", dtype=torch.float16)
    weights = {}
    for path, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            weights[path] = dequantized(module)
    plain = llama(**config)
    state = {key: value.half() for key, value in loaded.model.state_dict().items()}
    plain.load_state_dict({key: state[key] for key in plain.state_dict() if key in state}, strict=False)
    write_reference(out, plain, weights)
    shutil.rmtree(base)


def dequantized(module) -> torch.Tensor:
    """[out, in], by GPTQModel's own code: what the module makes of each unit vector."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T.contiguous().half()
    bias, module.bias = module.bias, None
    weight = module(torch.eye(module.in_features, dtype=torch.float16))
    module.bias = bias
    return weight.T.contiguous().half()


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t1", eos_token="t2").save_pretrained(
        directory
    )


@torch.no_grad()
def compressed(name: str, config: dict, scheme: dict) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import save_file

    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    strategy = "channel" if scheme["group_size"] is None else "group"
    args = QuantizationArgs(type="int", strategy=strategy, dynamic=False, **scheme)
    described = QuantizationScheme(targets=["Linear"], weights=args)
    model = llama(**config)
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    weights = {}
    for path in LINEARS:
        weight = tensors.pop(f"{path}.weight")
        groups = weight.reshape(len(weight), -1, scheme["group_size"] or weight.shape[1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale.half(), "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, described)
        weights[path] = PackedQuantizationCompressor.decompress(packed, described)["weight"]
        tensors |= {f"{path}.{suffix}": value.contiguous() for suffix, value in packed.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    hf_config = json.loads(model.config.to_json_string(use_diff=False))
    hf_config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": json.loads(described.model_dump_json())},
    }
    (out / "config.json").write_text(json.dumps(hf_config, indent=1))
    write_reference(out, model, weights)


if __name__ == "__main__":
    torch.set_num_threads(2)
    kinds = {"gptq": (GPTQ, gptqmodel), "awq": (AWQ, gptqmodel), "compressed-tensors": (COMPRESSED, compressed)}
    for kind, (table, make) in kinds.items():
        for name, (config, settings) in table.items():
            if kind in sys.argv or name in sys.argv:
                make(name, config, settings)
