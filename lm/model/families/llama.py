"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783)."""

from lm.model.families.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    max_len=2048,
    fixed={"qk_norm": False},
    fields={"attention_bias": ("qkv_bias", "output_bias"), "mlp_bias": ("mlp_bias",)},
)
