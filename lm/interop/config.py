"""config.json of a Hugging Face checkpoint, read and written: every field is used, known to change nothing, or refused."""

from __future__ import annotations

import math
from typing import Any

from lm.experiment import Model, UserError, from_dict, to_dict

Plain = dict[str, Any]

# model_type -> (what the family fixes that its config does not say, max_position_embeddings where the config has none)
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({"qk_norm": False}, 2048),
    "qwen3": ({"qk_norm": True}, 32768),
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Fields that the reader uses
SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
USED = {*SIZES, "model_type", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"}
LARGEST_SIZE = 2**31 - 1

# Fields that would change the model: field -> the values with which it is this one
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "is_decoder": (True, False),  # False is what transformers writes for decoders, too
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attention_dropout": (0, 0.0),
}

# Fields that change nothing that a forward pass computes
HARMLESS = frozenset(
    {
        "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "dtype", "eos_token_id", "id2label", "initializer_range", "label2id",
        "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp",
        "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
        # of sampling, which older versions kept here
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "problem_type", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
        "tie_encoder_decoder", "tf_legacy_loss", "use_bfloat16",
    }
)  # fmt: skip

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(config: Any, where: str = "config.json") -> tuple[Model, int]:
    """The Model and the vocabulary size that a config.json describes; older field names are read too.

    A config without max_position_embeddings has what transformers gives its family (see FAMILIES).

    Args:
        where: the file, for messages.

    Raises:
        UserError: a family or a feature that the model does not have, a field that is missing, no number or unknown.
    """
    try:
        return _read_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _read_config(config: Any) -> tuple[Model, int]:
    if not isinstance(config, dict):
        raise UserError(f"holds {_shown(config)}; it should be a JSON object")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"model_type is {_shown(family)}; there are {', '.join(FAMILIES)}")
    _refuse_features(config)
    fixed, longest = FAMILIES[family]
    size = {name: _size(config, name) for name in SIZES}
    heads = size["num_attention_heads"]
    rope = _rope(config)
    model = Model(
        num_layers=size["num_hidden_layers"],
        embed_dim=size["hidden_size"],
        num_heads=heads,
        num_kv_heads=size["num_key_value_heads"] or heads,
        head_dim=size["head_dim"] or size["hidden_size"] // heads,
        mlp_dim=size["intermediate_size"],
        max_len=size["max_position_embeddings"] or longest,
        rope_theta=_positive("rope_theta", rope.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope),
        norm_eps=_positive("rms_norm_eps", _given(config, "rms_norm_eps", 1e-6)),
        tied_head=_flag(config, "tie_word_embeddings"),
        **fixed,
    )
    if heads % model.num_kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {model.num_kv_heads}")
    if model.head_dim < 2 or model.head_dim % 2:
        raise UserError(f"head_dim is {model.head_dim}; it should be even, at least 2")
    from_dict(to_dict(model), Model, "model")  # the ranges of the fields, whoever sets them
    return model, size["vocab_size"]


def write_config(model: Model, vocab_size: int) -> dict[str, Any]:
    """The config.json of a model, in both the current and the older field names of rope.

    Raises:
        UserError: the model has what no family here has.
    """
    for field in ("window", "softcap"):
        if getattr(model, field):
            raise UserError(f"model.{field} is {getattr(model, field)}; no family here has it: {', '.join(FAMILIES)}")
    family = next(name for name, (fixed, _) in FAMILIES.items() if fixed["qk_norm"] == model.qk_norm)
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling:
        rope = {"rope_type": "llama3", **dict(zip(LLAMA3, model.rope_scaling, strict=True))}
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "max_position_embeddings": model.max_len,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if model.rope_scaling else None,
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": model.param_dtype,
    }


# ---- what the model does not have ----------------------------------------------------------------------------------


def _refuse_features(config: Plain) -> None:
    """Raise where a field asks for what the model does not have, or is one that nobody here knows."""
    for name, values in ONLY.items():
        if (value := config.get(name)) is not None and value not in values:
            raise UserError(f"{name} is {_shown(value)}; the model has {_shown(values[0])} only")
    types = config.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(one != "full_attention" for one in types)):
        raise UserError(f"layer_types is {_shown(types)}; the model has full_attention in every layer only")
    window, used = config.get("sliding_window"), config.get("use_sliding_window")
    if used or (window is not None and used is None):
        raise UserError(
            f"sliding_window is {_shown(window)} and use_sliding_window {_shown(used)}; a model with a sliding "
            "window is not read (use_sliding_window false says that it is not used)"
        )
    known = {*USED, *ONLY, *HARMLESS, "layer_types", "sliding_window", "use_sliding_window"}
    strange = [name for name, value in config.items() if name not in known and value not in (None, False, [], {})]
    if strange:
        more = f" and {len(strange) - 10} more fields" if len(strange) > 10 else ""
        which = ", ".join(
            f"{name if name.isidentifier() else repr(name)} {_shown(config[name])}" for name in strange[:10]
        )
        raise UserError(f"the reader does not know {which}{more}, which may change the model; remove what does not")


def _rope(config: Plain) -> Plain:
    """The settings of the rotary embedding from all three places that have had them; UserError where they disagree."""
    found: Plain = {}
    theta = config.get("rope_theta")
    places = {"rope_scaling": config.get("rope_scaling"), "rope_parameters": config.get("rope_parameters")}
    for place, value in {"rope_theta": {"rope_theta": theta} if theta is not None else None, **places}.items():
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{place} is {_shown(value)}; it should be an object")
        given = {"rope_type" if name == "type" else name: one for name, one in (value or {}).items() if one is not None}
        for name, one in given.items():
            if name in found and found[name] != one:
                raise UserError(f"{place} has {name} {_shown(one)}, and another field has {_shown(found[name])}")
        found |= given
    partial = found.pop("partial_rotary_factor", 1.0)
    if partial not in ONLY["partial_rotary_factor"]:
        raise UserError(f"partial_rotary_factor is {_shown(partial)}; the model has 1 only")
    return found


def _rope_scaling(rope: Plain) -> tuple[float, ...]:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise UserError(f"rope scaling {_shown(kind)}; there are default and llama3")
    names = LLAMA3 if kind == "llama3" else ()
    strange = sorted(set(rope) - {"rope_type", "rope_theta", *names})
    if strange:
        raise UserError(f"rope type {kind} has {', '.join(map(_shown, strange))}, which the reader does not use")
    missing = [name for name in names if name not in rope]
    if missing:
        raise UserError(f"rope type llama3 lacks {', '.join(missing)}")
    numbers = tuple(_positive(name, rope[name]) for name in names)
    if numbers and not (numbers[0] >= 1 and numbers[1] < numbers[2]):
        raise UserError(
            f"rope type llama3 has factor {numbers[0]:g}, low_freq_factor {numbers[1]:g} and high_freq_factor "
            f"{numbers[2]:g}; factor should be at least 1, and low_freq_factor below high_freq_factor"
        )
    return numbers


# ---- fields --------------------------------------------------------------------------------------------------------


def _given(config: Plain, name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def _size(config: Plain, name: str) -> int:
    """A whole number from 1 on; 0 where a field that need not be there is not."""
    value = config.get(name)
    if value is None and name in OPTIONAL:
        return 0
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        what = "is missing" if name not in config else f"is {_shown(value)}"
        raise UserError(f"{name} {what}; it should be a whole number from 1 to {LARGEST_SIZE}")
    return value


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} is {_shown(value)}; it should be a number above 0")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{name} is {_shown(value)}; it is too large") from None


def _flag(config: Plain, name: str) -> bool:
    value = _given(config, name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name} is {_shown(value)}; it should be true or false")
    return value


def _shown(value: Any) -> str:
    """A value in at most 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, a list in a list in a list …
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "…"
