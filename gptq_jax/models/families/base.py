"""What the table of a family says, and how a Hugging Face config is read by it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.rope import SCALINGS, Rope

Fields = Mapping[str, Any]  # of a config, by the names that Llama has for them


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a `model_type` reads its config. Fields are called what Llama calls them.

    Attributes:
        renamed: what the family calls fields, the first name that is stated being read.
        defaults: values of fields a config file leaves out, as transformers has them.
        fixed: fields this family does not read, whatever a config file says.
        only: values that fields must have, as nothing else is supported.
        kinds: fields that no other family has, and their types.
        mlp_ratio: width inside the MLP over that of the residual stream, where a config states none.
        partial_rotary: a part of each head may be rotated.
        rope_kinds: what the family calls kinds of `SCALINGS`.
        structure: fields of `DecoderConfig` that all models of the family share.
        derive: fields of the config -> those of `DecoderConfig` that depend on them.
        inner: the field that has the config of the language model, in a config of several models.
    """

    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Fields = field(default_factory=dict)
    fixed: Fields = field(default_factory=dict)
    only: Fields = field(default_factory=dict)
    kinds: Mapping[str, type] = field(default_factory=dict)
    mlp_ratio: int | None = None
    partial_rotary: bool = False
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    structure: Mapping[str, Any] = field(default_factory=dict)
    derive: Callable[[Fields], dict[str, Any]] = lambda fields: {}
    inner: str | None = None


ROTATED_DOWN = "rotated_down"  # no family's: the config of a model that was rotated says so (rewrites.hadamard)

_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    ROTATED_DOWN: False,
}
_KINDS: dict[str, type] = {  # of the fields that are read, where they are not null
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), int),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor"), float),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", ROTATED_DOWN), bool),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict),
    "hidden_act": str,
}
_KIND_NAMES = {
    int: "an integer below 2**31",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}
_NULLABLE = (  # null is not the same as absent
    *("sliding_window", "num_key_value_heads", "head_dim"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_POSITIVE = (*_REQUIRED, "max_position_embeddings", "rms_norm_eps")


def read_config(model_type: str, family: Family, hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face config of this family describes.

    Raises:
        ValueError: a field is missing, of another type, or asks for what is not supported.
    """
    if family.inner and not isinstance(hf_config := hf_config.get(family.inner) or {}, dict):
        raise ValueError(f"{family.inner}={hf_config!r:.60} is not an object.")
    fields = _standard(family, hf_config)
    _check_kinds(family, fields)
    if family.mlp_ratio and fields.get("intermediate_size") is None and fields.get("hidden_size"):
        fields["intermediate_size"] = family.mlp_ratio * fields["hidden_size"]
    if missing := [_own(family, name) for name in _REQUIRED if fields.get(name) is None]:
        raise ValueError(f"the config of this {model_type} model lacks {', '.join(missing)}.")
    for name, value in family.only.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{_own(family, name)}={fields[name]!r:.60} is not supported: only {value!r} is.")
    for name in _POSITIVE:
        if not fields[name] > 0:
            raise ValueError(f"{_own(family, name)}={fields[name]} must be positive.")
    heads = fields["num_attention_heads"]
    if not fields.get("head_dim") and fields["hidden_size"] % heads:
        names = (_own(family, "hidden_size"), _own(family, "num_attention_heads"))
        raise ValueError(f"{names[0]}={fields['hidden_size']} is no multiple of {names[1]}={heads}.")
    common = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "context_length": fields["max_position_embeddings"],
        "rope": read_rope(family, fields),
        "norm_eps": fields["rms_norm_eps"],
        "hidden_act": fields["hidden_act"],
        "attention_bias": fields["attention_bias"],
        "mlp_bias": fields["mlp_bias"],
        "rotated_down": fields[ROTATED_DOWN],
        "sliding_window": fields["sliding_window"],
        "tie_embeddings": fields["tie_word_embeddings"],
    }
    return DecoderConfig(**{**common, **family.structure, **family.derive(fields)})


def read_rope(family: Family, fields: Fields) -> Rope:
    """The rotary embedding: all in `rope_parameters` since transformers 5, in several fields before.

    Raises:
        ValueError: a number is none, or asks for what is not supported.
    """
    found = {
        "rope_theta": fields.get("rope_theta"),
        "partial_rotary_factor": fields.get("partial_rotary_factor"),
        **(fields.get("rope_scaling") or {}),
        **(fields.get("rope_parameters") or {}),
    }
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str):
        raise ValueError(f"rope_type={kind!r:.60} is not a string.")
    kind = family.rope_kinds.get(kind, kind)
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (number or name in _ROPE_NUMBERS) and value is not None and not _is(value, float):
            raise ValueError(f"{name}={value!r:.60} is not {_KIND_NAMES[float]}.")
        if isinstance(value, list) and not all(_is(item, float) for item in value):
            raise ValueError(f"{name}={value!r:.60} is not a list of finite numbers.")
    partial = found["partial_rotary_factor"] or 1.0
    if partial != 1.0 and not family.partial_rotary:
        raise ValueError(f"partial_rotary_factor={partial} is not supported: only 1.0 is.")
    needs = SCALINGS[kind].needs if kind in SCALINGS else ()
    if "original_max_position_embeddings" in needs:
        # Where it is left out, transformers takes the context the config states.
        found["original_max_position_embeddings"] = (
            found.get("original_max_position_embeddings")
            or fields.get("original_max_position_embeddings")
            or fields["max_position_embeddings"]
        )
    if "long_factor" in needs and found.get("factor") is None:
        found["factor"] = fields["max_position_embeddings"] / found["original_max_position_embeddings"]
    settings = {
        name: tuple(map(float, value)) if isinstance(value, list) else float(value)
        for name, value in found.items()
        if name not in _ROPE_NUMBERS and isinstance(value, int | float | list)
    }
    theta = float(found["rope_theta"] or 10000.0)
    return Rope(theta=theta, kind=kind, settings=tuple(sorted(settings.items())), partial=float(partial))


_ROPE_NUMBERS = ("rope_theta", "partial_rotary_factor")


def by_layer_type(types: Sequence[str], **overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DecoderConfig` for blocks of several types.

    Args:
        types: of each block, as configs name them.
        overrides: of each type, the fields in which its blocks differ.

    Raises:
        ValueError: there are other types.
    """
    if unknown := sorted(set(map(str, types)) - set(overrides)):
        raise ValueError(f"layer_types holds {unknown}: only {sorted(overrides)} are supported.")
    if len(set(types)) == 1:
        return dict(overrides[types[0]])
    return {
        "layer_kinds": tuple(types),
        "kinds": tuple((kind, tuple(fields.items())) for kind, fields in overrides.items()),
    }


def _standard(family: Family, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields by Llama's names, with what it leaves out."""
    stated = {name: value for name, value in hf_config.items() if value is not None or name in _NULLABLE}
    for name, own in family.renamed.items():
        value = next((stated[other] for other in own if stated.get(other) is not None), None)
        if value is not None:
            stated[name] = value
    return {"sliding_window": None, **_DEFAULTS, **family.defaults, **stated, **family.fixed}


def _own(family: Family, name: str) -> str:
    """What the family calls a field."""
    return family.renamed[name][0] if name in family.renamed else name


def _check_kinds(family: Family, fields: Fields) -> None:
    """Raise ValueError naming every field of another type than it should be, or a number beyond all bounds."""
    wrong = [
        f"{_own(family, name)}={fields[name]!r:.60} is not {_KIND_NAMES[kind]}"
        for name, kind in {**_KINDS, **family.kinds}.items()
        if fields.get(name) is not None and not _is(fields[name], kind)
    ]
    if wrong:
        raise ValueError(f"the config cannot be read: {'; '.join(wrong)}.")


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and abs(value) < 2**31
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
    return type(value) is kind
