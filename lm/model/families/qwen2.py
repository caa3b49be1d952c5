"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama with biases in the q, k and v projections."""

from lm.model.families.family import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    max_len=32768,
    fixed={"qk_norm": False, "qkv_bias": True},
    ignored=("max_window_layers",),
)
