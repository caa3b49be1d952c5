"""The `Family` value: how a model family's config.json maps to Model, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Plain = Mapping[str, Any]

# Ours, below `blocks` -> theirs, below `model.layers.N`
LLAMA_LAYER: dict[str, str] = {
    "attn_norm/scale": "input_layernorm.weight",
    "attention/q/weight": "self_attn.q_proj.weight",
    "attention/k/weight": "self_attn.k_proj.weight",
    "attention/v/weight": "self_attn.v_proj.weight",
    "attention/o/weight": "self_attn.o_proj.weight",
    "attention/q/bias": "self_attn.q_proj.bias",
    "attention/k/bias": "self_attn.k_proj.bias",
    "attention/v/bias": "self_attn.v_proj.bias",
    "attention/o/bias": "self_attn.o_proj.bias",
    "attention/q_norm/scale": "self_attn.q_norm.weight",
    "attention/k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/weight": "mlp.gate_proj.weight",
    "mlp/up/weight": "mlp.up_proj.weight",
    "mlp/down/weight": "mlp.down_proj.weight",
    "mlp/gate/bias": "mlp.gate_proj.bias",
    "mlp/up/bias": "mlp.up_proj.bias",
    "mlp/down/bias": "mlp.down_proj.bias",
}


@dataclass(frozen=True)
class Family:
    """A model family; a field of config.json that neither it nor `lm/interop/config.py` knows is refused.

    Args:
        model_type, architecture: as config.json names them.
        max_len: of a config without max_position_embeddings, as transformers has it.
        fixed: fields of Model that every member has.
        fields: field of config.json -> the fields of Model with the same value; null or absent: see `defaults`.
        defaults: values of fields that a config leaves out, where transformers has others than Model.
        only: fields that would change the model -> the values with which they do not.
        ignored: fields that change nothing in this family.
        activation: the field of config.json that names the activation.
        scales_embedding: embeddings are multiplied by the square root of their width.
        slides: (config, layer) -> whether that layer has a window where the config has no layer_types; None: none has.
        reads_layer_types: layer_types may differ from `slides`; False: transformers has no such field, and one that differs is refused.
        rope_theta: rope base, where the config has none.
        local_rope_theta: rope base of layers with a window, where the config has no other; None: that of all layers.
        rotates_part: `partial_rotary_factor` says which part of a head is rotated.
        layer_names: tensors of a layer, ours -> theirs; those with the same tensor stand in it one behind another, in this order.
    """

    model_type: str
    architecture: str
    max_len: int
    fixed: Plain = field(default_factory=dict)
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Plain = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    activation: str = "hidden_act"
    scales_embedding: bool = False
    slides: Callable[[Plain, int], bool] | None = None
    reads_layer_types: bool = True
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    rotates_part: bool = False
    layer_names: Mapping[str, str] = field(default_factory=lambda: LLAMA_LAYER)
