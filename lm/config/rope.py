"""RoPE scaling: the kinds of it, and which one the numbers of a field `rope_scaling` are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class LinearRope(NamedTuple):
    """Position interpolation: all frequencies divided by a factor (arXiv 2306.15595)."""

    factor: float


class DynamicRope(NamedTuple):
    """Dynamic NTK scaling: a larger base where `model.max_len` is beyond the original length (arXiv 2309.00071 sec. 3.3).

    The base is that of a sequence of `model.max_len` tokens, whatever the length of a row, so that logits depend neither
    on packing nor on the cache. In transformers it grows with the sequence: its logits are the same up to the original
    length with `model.max_len` at the original length, and for a sequence of exactly `model.max_len` tokens.
    """

    factor: float
    original_len: float


class Llama3Rope(NamedTuple):
    """Llama 3.1: frequencies below original/low_freq_factor divided by a factor, above original/high_freq_factor kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: float


class YarnRope(NamedTuple):
    """YaRN: frequencies of few turns divided by a factor, of many kept, and larger attention scores (arXiv 2309.00071 sec. 3.4).

    Args:
        beta_fast, beta_slow: turns within `original_len` from which frequencies are kept, below which they are divided.
        attention_factor: multiplier of rotated queries and keys; 0: 0.1 ln(factor) + 1.
        truncate: 1: dimensions between the two are rounded outwards to whole ones; 0: they are not.
    """

    factor: float
    original_len: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: float = 1.0


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope
ROPE_KINDS: tuple[type[RopeScaling], ...] = (LinearRope, DynamicRope, Llama3Rope, YarnRope)


def longest_sequence(max_len: int, scalings: Iterable[Sequence[float]]) -> int:
    """Maximum sequence length of a published model: dynamic NTK and YaRN extend the original length by their factor."""
    ropes = [rope for rope in map(rope_kind, scalings) if isinstance(rope, DynamicRope | YarnRope)]
    return max([max_len, *(int(rope.factor * rope.original_len) for rope in ropes)])


def rope_kind(numbers: Sequence[float]) -> RopeScaling | None:
    """The kind of RoPE scaling with this count of numbers; None for 0. Raises KeyError for other counts."""
    return {len(kind._fields): kind for kind in ROPE_KINDS}[len(numbers)](*numbers) if numbers else None


def rope_fault(numbers: Sequence[float], theta: float, head_dim: int) -> str:
    """A text that says what the numbers of a RoPE scaling should be; empty if they are valid."""
    counts = {len(kind._fields): kind.__name__ for kind in ROPE_KINDS}
    if numbers and len(numbers) not in counts:
        return f"it should be empty, or have {', '.join(f'{n} ({name})' for n, name in counts.items())} numbers"
    rope = rope_kind(numbers)
    if rope is None:
        return ""
    if rope.factor <= 0 or (rope.factor < 1 and not isinstance(rope, LinearRope)):
        return "factor should be at least 1 (in LinearRope above 0)"
    if not isinstance(rope, LinearRope) and rope.original_len < 2:
        return "the original length should be at least 2"
    match rope:
        case DynamicRope() if head_dim < 4:
            return f"dynamic scaling needs head_dim of at least 4, found {head_dim}"
        case Llama3Rope() if not 0 < rope.low_freq_factor < rope.high_freq_factor:
            return "low_freq_factor should be above 0 and below high_freq_factor"
        case YarnRope() if not 0 < rope.beta_slow <= rope.beta_fast:
            return "beta_slow should be above 0 and not above beta_fast"
        case YarnRope() if rope.truncate not in (0, 1):
            return "truncate should be 0 or 1"
        case YarnRope() if theta <= 1:
            return f"YaRN needs rope_theta above 1, found {theta:g}"
    return ""


def dynamic_theta(theta: float, rope: DynamicRope, head_dim: int, max_len: int) -> float:
    """The RoPE base of dynamic NTK scaling for `max_len` tokens. Source: arXiv 2309.00071 sec. 3.1, 3.3."""
    stretch = rope.factor * max(max_len / rope.original_len, 1) - (rope.factor - 1)
    return theta * stretch ** (head_dim / (head_dim - 2))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Multiplier of rotated queries and keys in YaRN. Source: arXiv 2309.00071 sec. 3.4."""
    return 0.1 * mscale * math.log(factor) + 1
