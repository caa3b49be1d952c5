"""Reads and writes config.json of Hugging Face checkpoints; every field is used, known to have no effect, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lm.config.field import shown
from lm.config.model import LAYER_FIELDS
from lm.config.rope import LongRope, longest_sequence, rope_kind
from lm.experiment import Layer, Model, UserError, from_dict, to_dict
from lm.interop.rope import ORIGINAL, PART, read_rope, read_scaling, rope_fields, rotated_part, static_rope
from lm.interop.values import Plain, flag, given, positive, read_size
from lm.model.families import FAMILIES
from lm.model.families.family import Family

FULL, LOCAL = "full_attention", "sliding_attention"
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""Names of activations in config.json -> Model.activation."""

# Fields that the reader uses
SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
USED = {
    *SIZES, "model_type", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "tie_word_embeddings",
    "layer_types", "sliding_window", "use_sliding_window",
}  # fmt: skip
# Fields of Model that decide how it runs, not what it computes; config.json has none of them
RUNNING = (
    "attention", "attention_blocks", "remat", "scan_unroll", "param_dtype", "compute_dtype", "logits_dtype", "max_logits",
)  # fmt: skip

# Fields that would change the model: field -> the supported values
ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),  # but in a family that rotates a part
    "rope_interleaved": (False,),
    "is_decoder": (True, False),  # False is what transformers writes for decoders, too
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attention_dropout": (0, 0.0),
}

# Fields that do not affect a forward pass
HARMLESS = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
        "auto_map", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype", "eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id",
        "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp",
        "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers.js_config", "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
        # of sampling, which older versions kept here
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "problem_type", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
        "tie_encoder_decoder", "tf_legacy_loss", "use_bfloat16",
    }
)  # fmt: skip

SWITCH = "use_sliding_window"


def read_config(config: Any, where: str = "config.json") -> tuple[Model, int]:
    """The Model and vocabulary size described by a config.json; older field names are read too.

    A config without max_position_embeddings has what transformers gives its family (see `lm/model/families`).

    Args:
        where: the file, for messages.

    Raises:
        UserError: an unsupported family or feature, or a field that is missing, invalid or unknown.
    """
    try:
        return _read_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _read_config(config: Any) -> tuple[Model, int]:
    if not isinstance(config, dict):
        raise UserError(f"holds {shown(config)}; it should be a JSON object")
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        made = f" ({shown(config['architectures'])})" if config.get("architectures") else ""
        raise UserError(f"model_type is {shown(name)}{made}; there are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _refuse_features(config, family)
    config = {**family.defaults, **config}
    if SWITCH in family.defaults and not flag(config, SWITCH):
        config["sliding_window"] = None
    size = {name: read_size(config, name) for name in SIZES}
    heads = size["num_attention_heads"]
    fields = {ours: value for theirs, both in family.fields.items() for ours, value in _same(config, theirs, both)}
    of_layers = {name: fields.pop(name) for name in LAYER_FIELDS if name in fields}
    model = Model(
        num_layers=size["num_hidden_layers"],
        embed_dim=size["hidden_size"],
        num_heads=heads,
        num_kv_heads=size["num_key_value_heads"] or heads,
        head_dim=size["head_dim"] or size["hidden_size"] // heads,
        mlp_dim=size["intermediate_size"],
        max_len=size["max_position_embeddings"] or family.max_len,
        norm_eps=positive("rms_norm_eps", given(config, "rms_norm_eps", 1e-6)),
        tied_head=flag(config, "tie_word_embeddings"),
        activation=_activation(config, family.activation),
        embed_scale=size["hidden_size"] ** 0.5 if family.scales_embedding else 1.0,
        **dict(family.fixed) | fields,
    )
    if heads % model.num_kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {model.num_kv_heads}")
    if model.head_dim < 2 or model.head_dim % 2:
        raise UserError(f"head_dim is {model.head_dim}; it should be even, at least 2")
    if model.query_pre_attn_scalar == model.head_dim:
        model = replace(model, query_pre_attn_scalar=0.0)
    model = replace(model, rope_dim=rotated_part(config, model.head_dim) if family.rotates_part else 0)
    from_dict(to_dict(model), Model, "model")  # the ranges of the fields, whoever sets them
    model = with_layers(model, _layers(config, family, model, of_layers))
    from_dict(to_dict(model), Model, "model")
    ropes = [rope_kind(layer.rope_scaling) for layer in model.period]
    trained = [int(rope.original_len) for rope in ropes if isinstance(rope, LongRope)]
    return replace(model, max_len=min([model.max_len, *trained])), size["vocab_size"]


def with_layers(model: Model, layers: tuple[Layer, ...]) -> Model:
    """The model with these settings per layer, written as its shortest repeating pattern."""
    count = len(layers)
    period = next(size for size in range(1, count + 1) if layers[size:] == layers[: count - size])
    if period > 1:
        return replace(model, pattern=layers[:period])
    return replace(model, **{name: getattr(layers[0], name) for name in LAYER_FIELDS})


def write_config(model: Model, vocab_size: int, family: str = "") -> dict[str, Any]:
    """The config.json of a model; RoPE in current and older field names.

    Args:
        family: its model_type, used if that family can represent the model, else the first that can.

    Raises:
        UserError: no family can represent the model.
    """
    lost: dict[str, list[str]] = {}
    for name, known in sorted(FAMILIES.items(), key=lambda item: item[0] != family):
        config = _write_config(known, model, vocab_size)
        again = _essence(_read_config(config)[0])
        lost[name] = [field for field, value in _essence(model).items() if again[field] != value]
        if not lost[name]:
            return config
    closest = min(lost, key=lambda name: len(lost[name]))
    field = lost[closest][0]
    value = getattr(model, field)
    raise UserError(
        f"model.{field} is {value}; no family here has it: {', '.join(FAMILIES)} ({closest} has all but "
        f"{', '.join(lost[closest])})"
    )


def computes_the_same(one: Model, other: Model) -> bool:
    """Whether two models compute the same; they may differ in how they run and in their maximum length."""
    return _essence(one) | {"max_len": 0} == _essence(other) | {"max_len": 0}


def _essence(model: Model) -> Plain:
    """The fields of a model that decide what it computes; for fields of layers, the values of all layers."""
    layers = [static_rope(model.layer(number), model) for number in range(model.num_layers)]
    found = {field: value for field, value in vars(model).items() if field not in (*RUNNING, "pattern")}
    found |= {field: [getattr(layer, field) for layer in layers] for field in LAYER_FIELDS}
    if any(isinstance(rope_kind(layer.rope_scaling), LongRope) for layer in layers):
        found["max_len"] = 0  # the published length is that of the scaling
    return found | {"query_pre_attn_scalar": model.query_pre_attn_scalar or model.head_dim}


def _write_config(family: Family, m: Model, vocab_size: int) -> Plain:
    layers = [static_rope(m.layer(number), m) for number in range(m.num_layers)]
    full = next((layer for layer in layers if not layer.window), layers[0])
    local = next((layer for layer in layers if layer.window), None)
    rope = nested = rope_fields(full)
    if family.local_rope_theta is not None:
        nested = {FULL: rope, LOCAL: rope_fields(local or Layer(rope_theta=family.local_rope_theta))}
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_hidden_layers": m.num_layers,
        "hidden_size": m.embed_dim,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.mlp_dim,
        "max_position_embeddings": m.max_len,
        "rope_theta": full.rope_theta,
        "rope_scaling": {name: one for name, one in rope.items() if name != "rope_theta"}
        if full.rope_scaling
        else None,
        "rope_parameters": nested,
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tied_head,
        "vocab_size": vocab_size,
        family.activation: next(theirs for theirs, ours in ACTIVATIONS.items() if ours == m.activation),
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": m.param_dtype,
    }
    if m.rope_dim and family.rotates_part:
        rope[PART] = config[PART] = m.rope_dim / m.head_dim
    if isinstance(rope_kind(full.rope_scaling), LongRope):
        config["max_position_embeddings"] = longest_sequence(2, [full.rope_scaling])
        config |= {ORIGINAL: rope[ORIGINAL]} if ORIGINAL in family.defaults else {}
    for theirs, (ours, *_) in family.fields.items():
        value = getattr(layers[0] if ours in LAYER_FIELDS else m, ours)
        config[theirs] = value if isinstance(value, bool) else value or None
    if "query_pre_attn_scalar" in config:
        scalar = m.query_pre_attn_scalar or m.head_dim
        config["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar  # transformers wants an int
    if family.slides is not None:
        config["sliding_window"] = local.window if local else None
        kinds = [LOCAL if layer.window else FULL for layer in layers]
        if SWITCH in family.defaults:
            config |= {SWITCH: local is not None, "max_window_layers": kinds.index(LOCAL) if local else len(kinds)}
        differ = len(set(kinds)) > 1 or kinds != _kinds({**family.defaults, **config}, family, m.num_layers)
        if family.reads_layer_types and differ:
            config["layer_types"] = kinds
    return config


# ---- layers --------------------------------------------------------------------------------------------------------


def _layers(config: Plain, family: Family, model: Model, fields: Plain) -> tuple[Layer, ...]:
    """Settings of every layer."""
    window = 0
    if family.slides is not None and config.get("sliding_window") is not None:
        window = read_size(config, "sliding_window")
    rope, local = _ropes(config, family)
    theta = positive("rope_theta", rope.get("rope_theta", family.rope_theta))
    local_theta = positive("rope_theta", local.get("rope_theta", family.local_rope_theta or theta))
    each = {
        FULL: Layer(rope_theta=theta, rope_scaling=read_scaling(rope, theta, model), **fields),
        LOCAL: Layer(
            window=window, rope_theta=local_theta, rope_scaling=read_scaling(local, local_theta, model), **fields
        ),
    }
    return tuple(each[kind] for kind in _kinds(config, family, model.num_layers))


def _kinds(config: Plain, family: Family, count: int) -> list[str]:
    """The kind of attention of each layer, by config.json or else by the family's default."""
    types = config.get("layer_types")
    if types is None:
        return _default_kinds(config, family, count)
    allowed = (FULL,) if family.slides is None else (FULL, LOCAL)
    if not isinstance(types, list) or any(one not in allowed for one in types):
        raise UserError(f"layer_types is {shown(types)}; the layers of {family.model_type} have {' or '.join(allowed)}")
    if len(types) != count:
        raise UserError(f"layer_types has {len(types)} entries for {count} layers")
    if LOCAL in types and config.get("sliding_window") is None:
        raise UserError(f"layer_types has {LOCAL}, and sliding_window is missing")
    if not family.reads_layer_types and types != _default_kinds(config, family, count):
        window = shown(config.get("sliding_window"))
        raise UserError(
            f"layer_types is {shown(types)} with sliding_window {window}; {family.model_type} has one window for all layers"
        )
    return types


def _default_kinds(config: Plain, family: Family, count: int) -> list[str]:
    slides = family.slides if config.get("sliding_window") is not None else None
    for name, least in {"sliding_window_pattern": 1, "max_window_layers": 0}.items():
        if name in family.defaults and (type(config[name]) is not int or config[name] < least):
            raise UserError(f"{name} is {shown(config[name])}; it should be a whole number from {least}")
    return [LOCAL if slides is not None and slides(config, layer) else FULL for layer in range(count)]


def _ropes(config: Plain, family: Family) -> tuple[Plain, Plain]:
    """The settings of the rotary embedding of layers without and with a window."""
    if family.local_rope_theta is None:
        rope = read_rope(config)
        return rope, rope
    given = config.get("rope_parameters")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError(f"rope_parameters is {shown(given)}; it should be an object")
    if strange := sorted(set(given) - {FULL, LOCAL}):  # transformers leaves them out without a word
        raise UserError(
            f"rope_parameters has {', '.join(map(shown, strange))}, which the reader does not use: {family.model_type} has "
            f"settings for {FULL} and for {LOCAL}"
        )
    full = {name: config.get(name) for name in ("rope_scaling", "rope_theta")}
    local = {"rope_theta": config.get("rope_local_base_freq"), "rope_parameters": given.get(LOCAL)}
    return read_rope(full | {"rope_parameters": given.get(FULL)}), read_rope(local)


# ---- unsupported features ------------------------------------------------------------------------------------------


def _refuse_features(config: Plain, family: Family) -> None:
    """Raise UserError if a field requests an unsupported feature or is unknown."""
    only = {**ONLY, **family.only}
    for name, values in only.items():
        value = config.get(name)
        read = name in family.fields or (name == PART and family.rotates_part)
        if not read and value is not None and value not in values:
            raise UserError(f"{name} is {shown(value)}; the model has {shown(values[0])} only")
    window, used = config.get("sliding_window"), config.get(SWITCH)
    if family.slides is None and (used or (window is not None and used is None)):
        raise UserError(
            f"sliding_window is {shown(window)} and use_sliding_window {shown(used)}; {family.model_type} with a "
            "sliding window is not read (use_sliding_window false says that it is not used)"
        )
    known = {*USED, *only, *HARMLESS, *family.fields, *family.ignored, family.activation}
    known |= {"rope_local_base_freq"} if family.local_rope_theta is not None else set()
    strange = [name for name, value in config.items() if name not in known and value not in (None, False, [], {})]
    if strange:
        more = f" and {len(strange) - 10} more fields" if len(strange) > 10 else ""
        which = ", ".join(
            f"{name if name.isidentifier() else repr(name)} {shown(config[name])}" for name in strange[:10]
        )
        raise UserError(f"the reader does not know {which}{more}, which may change the model; remove what does not")


# ---- fields --------------------------------------------------------------------------------------------------------


def _same(config: Plain, theirs: str, ours: tuple[str, ...]) -> list[tuple[str, Any]]:
    """(field of Model, value) for a field of config.json that Model also has; null means false or 0."""
    if isinstance(getattr(Model, ours[0]), bool):
        value: Any = flag(config, theirs)
    else:
        value = 0.0 if config.get(theirs) is None else positive(theirs, config[theirs])
    return [(name, value) for name in ours]


def _activation(config: Plain, name: str) -> Any:
    value = given(config, name, "gelu_pytorch_tanh" if name == "hidden_activation" else "silu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UserError(f"{name} is {shown(value)}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]
