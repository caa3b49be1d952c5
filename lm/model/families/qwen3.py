"""Qwen 3, the dense ones (arXiv 2505.09388): a norm on each query and key head."""

from lm.model.families.family import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    max_len=32768,
    fixed={"qk_norm": True},
    ignored=("max_window_layers",),
)
