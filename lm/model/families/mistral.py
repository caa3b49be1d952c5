"""Mistral 7B (arXiv 2310.06825): Llama with a sliding window in every layer, which later models set to null."""

from lm.model.families.family import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    max_len=131072,
    fixed={"qk_norm": False},
    defaults={"sliding_window": 4096},
    slides=lambda config, layer: True,
)
