"""Flax parameter trees of transformers 4 under Hugging Face's torch names: what differs, as tables.

Both have the same modules; only the last name of a path says what a parameter is (transformers 4,
modeling_flax_pytorch_utils.py, `rename_key_and_reshape_tensor`). A kernel is always the transpose of the torch
weight: [d_in, d_out] in `nn.Dense`, and [d_out, d_in] in GPT-2's FlaxConv1D, whose torch weight is [d_in, d_out].
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

# A Flax parameter -> torch's name for it, and whether its axes are exchanged.
PARAMETERS: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "kernel": ("weight", True),
        "embedding": ("weight", False),
        "scale": ("weight", False),  # nn.LayerNorm
        "weight": ("weight", False),  # RMSNorm of Llama, Mistral and Gemma
        "bias": ("bias", False),
    }
)
HEAD = "lm_head"
# FlaxLlamaForCausalLM and FlaxMistralForCausalLM have a head of their own even where the config ties it.
NEVER_TIED = ("llama", "mistral")
# What a tree is wrapped in: Linen's collection, and the parameters of a train state.
COLLECTION = "params"


@dataclass(frozen=True)
class FlaxName:
    """Where a parameter of Hugging Face's lies in a Flax tree.

    Attributes:
        path: names joined by "/".
        transposed: its axes are exchanged.
    """

    path: str
    transposed: bool


def torch_names(paths: Iterable[str]) -> dict[str, FlaxName]:
    """Torch's names of the parameters of a Flax tree, in its order.

    Args:
        paths: of the tree's leaves, joined by "/"; with or without the collection "params", in which case whatever
            lies outside of it is passed over.

    Returns:
        Each torch name, like "model.layers.0.mlp.up_proj.weight"; a parameter that transformers did not have keeps
        its own name with dots. The base model alone has no "model." or "transformer." before its names, as in torch.

    Raises:
        ValueError: two parameters have one torch name.
    """
    found: dict[str, FlaxName] = {}
    for path, parts in unwrapped(paths).items():
        name, transposed = PARAMETERS.get(parts[-1], (parts[-1], False))
        torch_name = ".".join((*parts[:-1], name))
        if torch_name in found:
            raise ValueError(f"{found[torch_name].path!r} and {path!r} are both {torch_name}.")
        found[torch_name] = FlaxName(path, transposed)
    return found


def unwrapped(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Each path and its names inside of the collection "params", however often the tree is wrapped in it.

    Paths outside of it (an optimizer's state, a step) are left out.
    """
    inner = {path: tuple(path.split("/")) for path in paths}
    while any(parts[0] == COLLECTION for parts in inner.values()):
        inner = {path: parts[1:] for path, parts in inner.items() if parts[0] == COLLECTION and len(parts) > 1}
    return inner
