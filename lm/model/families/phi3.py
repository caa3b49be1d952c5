"""Phi 3 (arXiv 2404.14219): Llama with one matrix for queries, keys and values, and one for gate and up projection."""

from lm.model.families.family import LLAMA_LAYER, Family

QKV, GATE_UP = "self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    max_len=4096,
    fixed={"qk_norm": False},
    defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    only={"embd_pdrop": (0, 0.0), "resid_pdrop": (0, 0.0)},
    ignored=("original_max_position_embeddings",),  # read by longrope alone
    rotates_part=True,
    slides=lambda config, layer: True,
    reads_layer_types=False,
    layer_names=LLAMA_LAYER
    | {"attention/q/weight": QKV, "attention/k/weight": QKV, "attention/v/weight": QKV}
    | {"mlp/gate/weight": GATE_UP, "mlp/up/weight": GATE_UP},
)
