"""Gemma 2 (arXiv 2408.00118): sliding window in every other layer, soft caps on scores and logits, four norms per block."""

from lm.model.families.family import LLAMA_LAYER, Family

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    max_len=8192,
    fixed={"qk_norm": False, "norms": "sandwich", "norm_plus_one": True},
    fields={
        "attn_logit_softcapping": ("softcap",),
        "final_logit_softcapping": ("final_softcap",),
        "query_pre_attn_scalar": ("query_pre_attn_scalar",),
        "attention_bias": ("qkv_bias", "output_bias"),
    },
    defaults={
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "head_dim": 256,
    },
    only={"hidden_act": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)},
    ignored=("cache_implementation",),
    activation="hidden_activation",
    scales_embedding=True,
    slides=lambda config, layer: layer % 2 == 0,
    layer_names=LLAMA_LAYER
    | {
        "attn_post_norm/scale": "post_attention_layernorm.weight",
        "mlp_norm/scale": "pre_feedforward_layernorm.weight",
        "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
    },
)
