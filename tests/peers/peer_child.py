"""Run an exported checkpoint in another library, in a process of its own: no jax here.

    python peer_child.py gptqmodel|transformers|transformers-plain DIR REQUEST.npz ANSWER.npz

REQUEST holds prompts (padded by -1 on the left), new_tokens and tokens; ANSWER the greedy continuation of each
prompt and the logits of tokens.
"""

import os
import sys

# Compilation takes minutes, and the plain kernel reads the same words.
os.environ.update(GPTQMODEL_CPU_WORKERS="2", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")

import numpy as np
import torch

DTYPE = torch.float16


def in_float32(model):
    """GPTQModel loads in 16 bits only; in float32 its reading of the file is compared, not its rounding."""
    return torch.nn.Module.float(model)  # transformers' own method refuses quantized models


def by_gptqmodel(path):
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(path, backend=BACKEND.TORCH, device="cpu", dtype=DTYPE, offload_to_disk=False)
    return in_float32(loaded.model)


def by_transformers(path):
    from transformers import AutoModelForCausalLM, GPTQConfig

    with_backend = GPTQConfig(bits=4, backend="torch")
    return in_float32(
        AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, device_map="cpu", quantization_config=with_backend)
    )


def by_transformers_plainly(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")


LOADERS = {
    "gptqmodel": by_gptqmodel,
    "transformers": by_transformers,
    "transformers-plain": by_transformers_plainly,
}


def main(kind, path, request, answer):
    asked = np.load(request)
    model = LOADERS[kind](path).eval()
    found = {"kernel": np.array(type(model.model.layers[0].mlp.down_proj).__name__)}
    prompts = torch.from_numpy(asked["prompts"])
    with torch.inference_mode():
        # Together, because every step unpacks all weights anew.
        out = model.generate(
            input_ids=prompts.clamp(min=0),
            attention_mask=(prompts >= 0).long(),
            max_new_tokens=int(asked["new_tokens"]),
            do_sample=False,
            pad_token_id=0,
        )
        found["greedy"] = out[:, prompts.shape[1] :].numpy()
        found["logits"] = model(torch.from_numpy(asked["tokens"])).logits.float().numpy()
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
