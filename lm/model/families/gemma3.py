"""Gemma 3, text (arXiv 2503.19786): five sliding-window layers with their own RoPE base, then a global one; QK-norm."""

import dataclasses

from lm.model.families import gemma2

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    max_len=131072,
    fixed=dict(gemma2.FAMILY.fixed) | {"qk_norm": True},
    fields={theirs: ours for theirs, ours in gemma2.FAMILY.fields.items() if theirs != "attn_logit_softcapping"},
    defaults=dict(gemma2.FAMILY.defaults)
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window_pattern": 6},
    only=dict(gemma2.FAMILY.only)
    | {"attn_logit_softcapping": (None,)},  # transformers has the field, and no cap of scores
    ignored=("cache_implementation", "sliding_window_pattern", "_sliding_window_pattern"),
    slides=lambda config, layer: (layer + 1) % config["sliding_window_pattern"] != 0,
    rope_theta=1e6,
    local_rope_theta=10_000.0,
)
