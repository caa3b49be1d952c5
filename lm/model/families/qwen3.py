"""Qwen 3, dense models (arXiv 2505.09388): QK-norm per head."""

from lm.model.families.family import Family
from lm.model.families.qwen2 import WINDOWS

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    max_len=32768,
    fixed={"qk_norm": True},
    fields={"attention_bias": ("qkv_bias", "output_bias")},
    defaults=WINDOWS,
    ignored=tuple(WINDOWS),
    slides=lambda config, layer: layer >= config["max_window_layers"],
)
