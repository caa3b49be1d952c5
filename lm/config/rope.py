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


class LongRope(NamedTuple):
    """LongRoPE: each frequency divided by a factor of its own, and larger attention scores (arXiv 2402.13753).

    The factors are the short ones where `model.max_len` is at most `original_len`, else the long ones, whatever the length
    of a row. In transformers the length of the sequence decides, so that its logits are the same up to the original length
    with `model.max_len` at the original length, and for longer sequences with `model.max_len` above.

    Args:
        factor: published maximum length divided by `original_len`.
        attention_factor: multiplier of rotated queries and keys.
        short_factor, long_factor: divisors, one for each rotated pair of dimensions.
    """

    factor: float
    original_len: float
    attention_factor: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value of a field `rope_scaling`."""
        return (*self[:3], *self.short_factor, *self.long_factor)


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope
ROPE_KINDS: tuple[type[LinearRope | DynamicRope | Llama3Rope | YarnRope], ...] = (
    LinearRope,
    DynamicRope,
    Llama3Rope,
    YarnRope,
)
"""Kinds with a fixed count of numbers; LongRope has an odd one of at least 5."""


def longest_sequence(max_len: int, scalings: Iterable[Sequence[float]]) -> int:
    """Maximum sequence length of a published model: dynamic NTK, YaRN and LongRoPE extend the original length by their factor."""
    ropes = [rope for rope in map(rope_kind, scalings) if isinstance(rope, DynamicRope | YarnRope | LongRope)]
    return max([max_len, *(int(round(rope.factor * rope.original_len, 3)) for rope in ropes)])


def rope_kind(numbers: Sequence[float]) -> RopeScaling | None:
    """The kind of RoPE scaling with this count of numbers; None for 0. Raises KeyError for other counts."""
    if _is_long(numbers):
        half = (len(numbers) + 3) // 2
        factor, original_len, attention_factor = numbers[:3]
        return LongRope(factor, original_len, attention_factor, tuple(numbers[3:half]), tuple(numbers[half:]))
    return {len(kind._fields): kind for kind in ROPE_KINDS}[len(numbers)](*numbers) if numbers else None


def _is_long(numbers: Sequence[float]) -> bool:
    return len(numbers) % 2 == 1 and len(numbers) >= 5


def rope_fault(numbers: Sequence[float], theta: float, head_dim: int) -> str:
    """A text that says what the numbers of a RoPE scaling should be; empty if they are valid.

    Args:
        head_dim: dimensions of a head that are rotated.
    """
    counts = {len(kind._fields): kind.__name__ for kind in ROPE_KINDS}
    if numbers and len(numbers) not in counts and not _is_long(numbers):
        kinds = ", ".join(f"{n} ({name})" for n, name in counts.items())
        return f"it should be empty, or have {kinds} or 3 + {head_dim} (LongRope) numbers"
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
        case LongRope() if {len(rope.short_factor), len(rope.long_factor)} != {head_dim // 2}:
            counted = f"{len(rope.short_factor)} and {len(rope.long_factor)}"
            return f"it should have {head_dim // 2} short and {head_dim // 2} long factors, found {counted}"
        case LongRope() if min(numbers) <= 0:
            return "all numbers of LongRope should be above 0"
    return ""


def dynamic_theta(theta: float, rope: DynamicRope, head_dim: int, max_len: int) -> float:
    """The RoPE base of dynamic NTK scaling for `max_len` tokens. Source: arXiv 2309.00071 sec. 3.1, 3.3."""
    stretch = rope.factor * max(max_len / rope.original_len, 1) - (rope.factor - 1)
    return theta * stretch ** (head_dim / (head_dim - 2))


def long_attention_factor(factor: float, original_len: float) -> float:
    """Multiplier of rotated queries and keys in LongRoPE. Source: arXiv 2404.14219 (Phi 3), released configuration."""
    return math.sqrt(1 + math.log(factor) / math.log(original_len)) if factor > 1 else 1.0


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Multiplier of rotated queries and keys in YaRN. Source: arXiv 2309.00071 sec. 3.4."""
    return 0.1 * mscale * math.log(factor) + 1
