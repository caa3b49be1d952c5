"""RoPE settings of a config.json: read from the places where versions of it keep them, and written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lm.config.field import shown
from lm.config.rope import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeScaling,
    YarnRope,
    dynamic_theta,
    long_attention_factor,
    rope_fault,
    rope_kind,
    yarn_attention_factor,
)
from lm.experiment import Layer, Model, UserError
from lm.interop.values import Plain, flag, positive

ORIGINAL = "original_max_position_embeddings"
ROPES: dict[str, type[RopeScaling]] = {
    "linear": LinearRope, "dynamic": DynamicRope, "llama3": Llama3Rope, "yarn": YarnRope, "longrope": LongRope,
}  # fmt: skip
"""rope_type -> kind of RoPE scaling; default has none."""
PART = "partial_rotary_factor"


def read_rope(config: Plain) -> Plain:
    """The RoPE settings, from all three places that versions of config.json keep them. Raises UserError if they disagree."""
    found: Plain = {}
    theta = config.get("rope_theta")
    places = {"rope_scaling": config.get("rope_scaling"), "rope_parameters": config.get("rope_parameters")}
    for place, value in {"rope_theta": {"rope_theta": theta} if theta is not None else None, **places}.items():
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{place} is {shown(value)}; it should be an object")
        given = {"rope_type" if name == "type" else name: one for name, one in (value or {}).items() if one is not None}
        for name, one in given.items():
            if name in found and found[name] != one:
                raise UserError(f"{place} has {name} {shown(one)}, and another field has {shown(found[name])}")
        found |= given
    if found.get("rope_type") == "su" or (found.get("rope_type"), config.get("model_type")) == ("yarn", "phi3"):
        found["rope_type"] = "longrope"  # under its former names
    if found.get("rope_type") == "longrope" and config.get(ORIGINAL) is not None:
        found[ORIGINAL] = config[ORIGINAL]
    return found


def rotated_part(config: Plain, head_dim: int) -> int:
    """The dimensions of a head that RoPE rotates; 0 for all."""
    places = (config.get(name) for name in ("rope_scaling", "rope_parameters"))
    found = [
        positive(PART, one[PART]) for one in (config, *places) if isinstance(one, dict) and one.get(PART) is not None
    ]
    part = found[0] if found else 1.0
    if other := next((one for one in found if one != part), None):
        raise UserError(f"{PART} is {shown(part)}, and another field has {shown(other)}")
    width = int(head_dim * part)
    if part > 1 or width % 2 or width < 2:
        raise UserError(
            f"{PART} is {shown(part)}; it should be at most 1, and give an even part of head_dim {head_dim}"
        )
    return width if part < 1 else 0


def read_scaling(rope: Plain, theta: float, model: Model) -> tuple[float, ...]:
    """The numbers of a RoPE scaling. Raises UserError if one is missing, unknown or out of range."""
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ("default", *ROPES):
        raise UserError(f"rope scaling {shown(kind)}; there are default, {', '.join(ROPES)}")
    given = {name: value for name, value in rope.items() if name not in ("rope_type", "rope_theta")}
    part = given.pop(PART, 1.0)
    if part not in (1, 1.0) and not model.rope_dim:
        raise UserError(f"{PART} is {shown(part)}; the model has 1 only")
    made = ROPES.get(kind)
    ours = {ORIGINAL if name == "original_len" else name: name for name in made._fields} if made else {}
    if kind == "dynamic" and given.setdefault(ORIGINAL, model.max_len) != model.max_len:
        raise UserError(
            f"rope type dynamic has {ORIGINAL} {shown(given[ORIGINAL])}; it should be max_position_embeddings"
        )
    if kind == "yarn":
        given = _yarn_fields(given, model.max_len)
    if kind == "longrope":
        given = _long_fields(given, model.max_len)
    if strange := sorted(set(given) - set(ours)):
        raise UserError(f"rope type {kind} has {', '.join(map(shown, strange))}, which the reader does not use")
    if made is None:
        return ()
    if missing := [name for name, own in ours.items() if name not in given and own not in made._field_defaults]:
        raise UserError(f"rope type {kind} lacks {', '.join(missing)}")
    numbers = {ours[name]: _numbers(name, value) for name, value in given.items()}
    rope_value: Any = made(**numbers)
    scaling = rope_value.numbers if isinstance(rope_value, LongRope) else rope_value
    if fault := rope_fault(scaling, theta, model.rotated):
        raise UserError(
            f"rope type {kind} has {', '.join(f'{name} {value}' for name, value in given.items())}; {fault}"
        )
    return scaling


def _yarn_fields(given: Plain, max_len: int) -> Plain:
    """The fields of YaRN, where mscale and mscale_all_dim have become the attention factor that they stand for."""
    given = {ORIGINAL: max_len, **given, "truncate": float(flag({"truncate": True, **given}, "truncate"))}
    weights = [given.pop(name, 0) for name in ("mscale", "mscale_all_dim")]
    given.pop("finetuned", None)  # that the model was trained with the scaling
    if "attention_factor" in given or not all(weights) or "factor" not in given:
        return given
    factor = max(1.0, positive("factor", given["factor"]))
    up, down = (yarn_attention_factor(factor, positive("mscale", one)) for one in weights)
    return {**given, "attention_factor": up / down}


def _long_fields(given: Plain, max_len: int) -> Plain:
    """The fields of LongRoPE, with the attention factor and the factor of the maximum length."""
    given = {ORIGINAL: max_len, **given}
    original = positive(ORIGINAL, given[ORIGINAL])
    ratio = max(1.0, max_len / original)
    attention = long_attention_factor(positive("factor", given.get("factor", ratio)), max(original, 2.0))
    return {"attention_factor": attention, **given, "factor": ratio}


def _numbers(name: str, value: Any) -> Any:
    """A positive number, or several of LongRoPE."""
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list):
            raise UserError(f"{name} is {shown(value)}; it should be a list of numbers")
        return tuple(positive(name, one) for one in value)
    return value if name == "truncate" else positive(name, value)


def static_rope(layer: Layer, model: Model) -> Layer:
    """The layer, with the base of dynamic scaling as its own: transformers would let it grow with the sequence."""
    rope = rope_kind(layer.rope_scaling)
    if not isinstance(rope, DynamicRope):
        return layer
    theta = dynamic_theta(layer.rope_theta, rope, model.head_dim, model.max_len)
    return replace(layer, rope_theta=theta, rope_scaling=())


def rope_fields(layer: Layer) -> Plain:
    """RoPE of a layer as fields of config.json."""
    rope = rope_kind(layer.rope_scaling)
    if rope is None:
        return {"rope_theta": layer.rope_theta, "rope_type": "default"}
    fields: Plain = {
        ORIGINAL if name == "original_len" else name: list(value) if isinstance(value, tuple) else value
        for name, value in rope._asdict().items()
    }
    if not fields.get("attention_factor", 1):
        del fields["attention_factor"]
    if isinstance(rope, LongRope):
        del fields["factor"]  # that of the maximum length
    if ORIGINAL in fields:
        fields[ORIGINAL] = int(fields[ORIGINAL])
    if "truncate" in fields:
        fields["truncate"] = bool(fields["truncate"])
    kind = next(name for name, kind in ROPES.items() if isinstance(rope, kind))
    return {"rope_theta": layer.rope_theta, "rope_type": kind, **fields}
