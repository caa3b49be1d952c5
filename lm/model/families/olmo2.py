"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP, QK-norm over all heads together."""

from lm.model.families.family import LLAMA_LAYER, Family

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    max_len=2048,
    fixed={"qk_norm": True, "qk_norm_of": "heads", "norms": "post"},
    fields={"attention_bias": ("qkv_bias", "output_bias")},
    defaults={"rms_norm_eps": 1e-5},
    layer_names=LLAMA_LAYER
    | {
        "attn_post_norm/scale": "post_attention_layernorm.weight",
        "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
    },
)
