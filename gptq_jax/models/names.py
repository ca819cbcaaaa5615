"""Where a checkpoint has each part of a decoder, by Hugging Face's names."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Names:
    """Module names; the defaults are Llama's, and a part that a decoder lacks has a name that is never used.

    Attributes:
        blocks: the list of blocks; the names from `attention_norm` on are relative to one of them.
        embedding: the table of tokens.
        positions: the table of learned positions.
        embedding_norm: what is applied to embedded tokens.
        project_in: from the width of the table to that of the residual stream.
        project_out: back again, before the output head.
        final_norm: after the last block.
        head: the projection to the vocabulary.
        attention_norm: before attention, or after it where the residual is of kind "post".
        attention_post_norm: on what attention adds.
        mlp_norm: before the MLP, or after it where the residual is of kind "post".
        mlp_post_norm: on what the MLP adds.
        query: and key, value: the projections of attention; `qkv` where they are one.
        query_norm: and `key_norm`: on each head.
        output: the projection of what was attended to.
        gate: and `up`: the first layers of the MLP; `gate_up` where they are one.
        down: the last layer of the MLP.
        router: chooses experts.
        expert_gate: and `expert_up`, `expert_down`: the layers of experts, without the number of an expert.
    """

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    embedding_norm: str = "model.embed_layernorm"
    project_in: str = "model.project_in"
    project_out: str = "model.project_out"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = "post_feedforward_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    qkv: str = "self_attn.qkv_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate: str = "mlp.experts.gate_proj"
    expert_up: str = "mlp.experts.up_proj"
    expert_down: str = "mlp.experts.down_proj"
