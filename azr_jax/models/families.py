"""Names and layouts of weights in Hugging Face checkpoints, one two-way table per family.

A row says where one of our weights lives: the Hugging Face key (with `{layer}` for stacked blocks), and how to get
from their layout to ours and back. Loading and export read the same table.
"""

from __future__ import annotations

from azr_jax.models.config import ModelConfig
from azr_jax.models.layout import Row, from_heads, head_vector, into_heads, same, transposed


def weight_table(config: ModelConfig) -> dict[str, Row]:
    """Our path ("embed", "blocks/q", ...) -> its Row (names as in transformers' modeling_<family>.py)."""
    h, kv, hd = config.num_heads, config.num_kv_heads, config.head_dim
    layer = "model.layers.{layer}."
    table = {
        "embed": same("model.embed_tokens.weight"),
        "blocks/attn_norm": same(layer + "input_layernorm.weight"),
        "blocks/q": into_heads(layer + "self_attn.q_proj.weight", h, hd),
        "blocks/k": into_heads(layer + "self_attn.k_proj.weight", kv, hd),
        "blocks/v": into_heads(layer + "self_attn.v_proj.weight", kv, hd),
        "blocks/o": from_heads(layer + "self_attn.o_proj.weight", h, hd),
        "blocks/mlp_norm": same(layer + "post_attention_layernorm.weight"),
        "blocks/gate": transposed(layer + "mlp.gate_proj.weight"),
        "blocks/up": transposed(layer + "mlp.up_proj.weight"),
        "blocks/down": transposed(layer + "mlp.down_proj.weight"),
        "final_norm": same("model.norm.weight"),
    }
    if config.attention_bias:
        table["blocks/q_bias"] = head_vector(layer + "self_attn.q_proj.bias", h, hd)
        table["blocks/k_bias"] = head_vector(layer + "self_attn.k_proj.bias", kv, hd)
        table["blocks/v_bias"] = head_vector(layer + "self_attn.v_proj.bias", kv, hd)
    if config.qk_norm:
        table["blocks/q_norm"] = same(layer + "self_attn.q_norm.weight")
        table["blocks/k_norm"] = same(layer + "self_attn.k_norm.weight")
    if config.post_norms:  # Gemma 3 calls by `post_attention` what stands after, where others mean before
        table["blocks/attn_post_norm"] = same(layer + "post_attention_layernorm.weight")
        table["blocks/mlp_norm"] = same(layer + "pre_feedforward_layernorm.weight")
        table["blocks/mlp_post_norm"] = same(layer + "post_feedforward_layernorm.weight")
    if not config.tie_word_embeddings:
        table["lm_head"] = transposed("lm_head.weight")
    return table


def text_key(key: str) -> str | None:
    """The name a checkpoint's key has in a text-only checkpoint; None for weights of a vision part, left out.

    Gemma 3 with vision nests its text model, before and after transformers 4.52 in different ways.
    """
    for prefix in ("language_model.model.", "model.language_model."):
        if key.startswith(prefix):
            return "model." + key[len(prefix) :]
    vision = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    return None if key.startswith(vision) else key.removeprefix("language_model.")
