"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama with biases in the q, k and v projections."""

from lm.model.families.family import Family

WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
"""Layers from max_window_layers on have a window, where use_sliding_window says so."""

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    max_len=32768,
    fixed={"qk_norm": False, "qkv_bias": True},
    defaults=WINDOWS,
    ignored=tuple(WINDOWS),
    slides=lambda config, layer: layer >= config["max_window_layers"],
)
