"""Make the committed oracles of every architecture from torch and transformers.

    python tests/oracles/make_architecture_oracles.py [FOLDER] [CASE ...]

Needs torch and transformers, in an environment of their own: the library does not use torch. Writes, for every
case of tests/architecture_cases.py, the config and the tensors' names and shapes as transformers saves them, and
the logits, of a whole input and of a padded one. FOLDER is tests/oracles/architectures if it is not given.
Made with torch 2.13.0 (CPU, float32), transformers 5.23.0.
"""

import inspect
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import architecture_cases as cases  # noqa: E402

VOLATILE = ("transformers_version", "dtype")


def saved(folder: Path) -> tuple[dict, dict[str, list[int]]]:
    """What transformers wrote: the config, and the shapes of all tensors."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    return {key: value for key, value in config.items() if key not in VOLATILE}, shapes


@torch.no_grad()
def run(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The oracle of one case."""
    config = transformers.AutoConfig.for_model(**cases.CONFIGS[name])
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        stored, shapes = saved(Path(folder))
        cases.write_checkpoint(Path(folder), stored, shapes)
        loading = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **loading).eval()
    tokens = torch.from_numpy(cases.tokens(name)).long()
    padded = {"attention_mask": torch.from_numpy(cases.mask()).long()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        padded["position_ids"] = torch.from_numpy(cases.positions()).long()
    found = {name: model(tokens).logits.numpy(), f"{name}.padded": model(tokens, **padded).logits.numpy()}
    print(name, sum(np.prod(shape) for shape in shapes.values()), float(np.abs(found[name]).mean()))
    return {"config": stored, "tensors": shapes}, found


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    logits = dict(np.load(folder / "logits.npz")) if names and (folder / "logits.npz").exists() else {}
    for name in names or cases.CONFIGS:
        described, found = run(name)
        (folder / f"{name}.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
        logits |= found
    np.savez_compressed(folder / "logits.npz", **logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else cases.ORACLES, sys.argv[2:])
