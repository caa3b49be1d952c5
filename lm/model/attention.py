"""Attention: projections, rotary positions, masks, and the choice of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as named
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lm.config.rope import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    YarnRope,
    dynamic_theta,
    rope_kind,
    yarn_attention_factor,
)
from lm.experiment import Layer, Model, UserError
from lm.model.kernels import attention_cpu, cudnn, splash, splash_kernels
from lm.model.kernels.first_use import WITHOUT_SOFTCAP, kernel_problem, say
from lm.model.kernels.jax_splash import jax_splash
from lm.model.linear import Linear, contract
from lm.model.norm import Norm
from lm.parallel.rules import constrain, device_kind, platform, split_ways
from lm.types import pytree


class Attention(nnx.Module):
    """Attention of a block: q, k and v projections with norms and rotary positions, and the output projection."""

    def __init__(self, config: Model, keys: PRNGKeyArray, out_std: float):
        c, embed, std = config, {"embed": config.embed_dim}, config.embed_dim**-0.5
        queries, one = (
            {"heads": c.num_heads, "head_dim": c.head_dim},
            {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim},
        )
        self.q = Linear(keys[0], std, c.param_dtype, embed, queries, c.qkv_bias)
        self.k = Linear(keys[1], std, c.param_dtype, embed, one, c.qkv_bias)
        self.v = Linear(keys[2], std, c.param_dtype, embed, one, c.qkv_bias)
        out_std *= (c.num_heads * c.head_dim) ** -0.5
        self.o = Linear(keys[3], out_std, c.param_dtype, queries, embed, c.output_bias)
        sizes = [(c.head_dim,)] * 2 if c.qk_norm_of == "head" else [tuple(x.values()) for x in (queries, one)]
        self.q_norm, self.k_norm = (Norm(c, *size) if c.qk_norm else None for size in sizes)
        self.query_scale = (c.head_dim / c.query_pre_attn_scalar) ** 0.5 if c.query_pre_attn_scalar else 1.0

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B T D"]:
        """Output of attention, to be added by the block; `attend` maps queries [B H T K], keys and values [B N T K] to heads."""
        q, k, v = self.qkv(x, angles)
        if self.query_scale != 1:  # kernels divide scores by √head_dim
            q = q * self.query_scale
        return self.o(attend(q, k, v))

    def qkv(self, x: Float[Array, "B T D"], angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, with norms and RoPE applied."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is None or self.k_norm is None:
            q, k = rotate(q, angles), rotate(k, angles)
            return named(q, "qkv"), named(k, "qkv"), named(v, "qkv")
        # The gradient of a norm needs the norm's input: so the inputs are saved, and norm and RoPE computed again.
        q, k, v = named(q, "qkv"), named(k, "qkv"), named(v, "qkv")
        return rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles), v


def rope_frequencies(
    head_dim: int, theta: float, scaling: tuple[float, ...] = (), max_len: int = 0
) -> Float[Array, " half"]:
    """RoPE angle per position of each pair of dimensions, in radians.

    Args:
        head_dim: dimensions of a head that are rotated.
        scaling: numbers of one of the kinds in `lm/config/rope.py`.
        max_len: maximum length of a sequence, on which the base of DynamicRope and the factors of LongRope depend.
    Source: RoFormer (arXiv 2104.09864) eq. 15; Llama 3 (arXiv 2407.21783) sec. 3.4.3; YaRN (arXiv 2309.00071) sec. 3; LongRoPE
    (arXiv 2402.13753) sec. 3.
    """
    rope = rope_kind(scaling)
    if isinstance(rope, DynamicRope):
        theta = dynamic_theta(theta, rope, head_dim, max_len)
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    match rope:
        case LinearRope(factor):
            return frequencies / factor
        case LongRope(_, original, _, short, long):
            return frequencies / jnp.array(long if max_len > original else short, jnp.float32)
        case Llama3Rope(factor, low, high, original):
            turns = original * frequencies / (2 * math.pi)
            keep = jnp.clip((turns - low) / (high - low), 0, 1)
        case YarnRope(factor):
            first, last = _yarn_range(rope, head_dim, theta)
            keep = 1 - jnp.clip((jnp.arange(head_dim // 2) - first) / (last - first), 0, 1)
        case _:
            return frequencies
    return frequencies * (keep + (1 - keep) / factor)


def _yarn_range(rope: YarnRope, head_dim: int, theta: float) -> tuple[float, float]:
    """The pairs of dimensions between which YaRN goes over from keeping to dividing: those with beta_fast and beta_slow turns."""

    def pair(turns: float) -> float:
        return head_dim * math.log(rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last + 1e-3 if first == last else last


def rope_attention_factor(scaling: tuple[float, ...]) -> float:
    """Multiplier of rotated queries and keys: that of YaRN or LongRoPE, else 1."""
    rope = rope_kind(scaling)
    if isinstance(rope, YarnRope):
        return rope.attention_factor or yarn_attention_factor(rope.factor)
    return rope.attention_factor if isinstance(rope, LongRope) else 1.0


def rope_angles(
    positions: Int[Array, "B T"], frequencies: Float[Array, " half"], factor: float = 1.0
) -> tuple[Float[Array, "B 1 T half"], Float[Array, "B 1 T half"]]:
    """cos and sin of the RoPE angles at every position, times `factor`, float32, shared by all heads."""
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: Float[Array, "B H T K"], angles: tuple[Array, Array]) -> Float[Array, "B H T K"]:
    """Apply RoPE: rotate the pairs (x[i], x[i + R/2]) of the first R dimensions, those with angles, by the angle of their position."""
    cos, sin = angles
    if (rotated := 2 * cos.shape[-1]) < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :rotated], angles), x[..., rotated:]], axis=-1)
    if platform() == "tpu" and x.dtype == jnp.bfloat16:
        # Exchanging halves of a vector is slow there; a product with a matrix of -1, 0 and 1 is exact and almost free.
        turned = jnp.einsum("bhtk,kj->bhtj", x, _quarter_turn(x.shape[-1]), preferred_element_type=jnp.float32)
        cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (cos, sin))
        return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _quarter_turn(width: int) -> Float[Array, "K K"]:
    """The bfloat16 matrix that maps pairs (a, b) to (-b, a)."""
    eye = jnp.eye(width // 2, dtype=jnp.bfloat16)
    zero = jnp.zeros_like(eye)
    return jnp.block([[zero, eye], [-eye, zero]])


def attention_mask(
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    window: int = 0,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """Attention mask: keys of the query's segment that are not after it and less than `window` before it (0: any distance).

    Args:
        causal: False also shows keys after the query, at the same distances.
    """
    same = q_segments[:, :, None] == k_segments[:, None, :]
    back = q_positions[:, :, None] - k_positions[:, None, :]
    if not causal:
        return same & (jnp.abs(back) < window if window else True)
    return same & (back >= 0) & (back < window if window else True)


def attention_of(
    config: Model,
    layer: Layer,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    first: int = 0,
    causal: bool = True,
    branches: Int[Array, "B T"] | None = None,
) -> Callable[[Array, Array, Array], Array]:
    """The attention function (queries, keys, values) -> heads for rows with these positions and segments.

    It is the kernel that `config.attention` names, or the fastest of the device kind (auto), if it supports the shapes; else
    plain attention.

    Args:
        layer: the layer whose window and soft cap apply.
        first: index of the first query; tokens before it are keys only.
        causal: False: a token also attends to tokens after it.
        branches: number of each token's branch: tokens of branch 0 are seen by their whole segment, those of another by that
            branch alone, by plain attention.
    """
    window, softcap = layer.window, layer.softcap
    name = BEST.get(platform(), "plain") if config.attention == "auto" else config.attention
    rows, length = positions.shape
    if branches is not None:
        mask = attention_mask(positions, positions, segments, segments, window, causal)
        mask &= (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        return lambda q, k, v: named(attend(q, whole_rows(k), whole_rows(v), mask, softcap), "attention")
    if name == "splash":
        fits = causal and not first and splash.fits(rows, length, config.head_dim)
        name = _checked_splash(config.attention, length) if fits else "plain"
    if name == "cudnn":
        if platform() != "gpu":
            raise UserError(
                f"model.attention is cudnn, which needs an NVIDIA GPU, not a {platform()}; auto runs on any device"
            )
        fits = causal and not first and cudnn.fits(rows, length, config.head_dim, config.compute_dtype, softcap)
        name = _checked_cudnn(config.attention) if fits else "plain"
    if name == "jax_splash":
        return lambda q, k, v: jax_splash(q, k, v, segments, window, softcap)
    if name == "splash":
        return lambda q, k, v: splash.splash(q, k, v, segments, config.attention_blocks, window=window, softcap=softcap)
    if name == "cudnn":
        return lambda q, k, v: named(cudnn.cudnn_attention(q, k, v, segments, window), "attention")
    if name == "blocks" and causal and attention_cpu.fits() and not (window or softcap):
        return lambda q, k, v: named(attention_cpu.attend_in_blocks(q, k, v, segments), "attention")
    mask = attention_mask(positions[:, first:], positions, segments[:, first:], segments, window, causal)
    return lambda q, k, v: named(attend(q, whole_rows(k), whole_rows(v), mask, softcap), "attention")


def _checked_splash(asked: str, length: int) -> str:
    """Name of the kernel to use for splash: checked on this device, or a replacement (and one line that says so)."""
    problem = kernel_problem("tpu", _splash, _plain, (splash, splash_kernels))
    other = "jax_splash" if split_ways(length, "length") == 1 else "plain"
    return _unless_wrong("splash", "the attention kernel of lm", problem, asked, other)


def _checked_cudnn(asked: str) -> str:
    """Name of the kernel to use for cuDNN's: checked on this device, or plain (and one line that says so)."""
    problem = kernel_problem("gpu", _cudnn, _plain, (cudnn,), WITHOUT_SOFTCAP)
    return _unless_wrong("cudnn", "cuDNN's attention kernel", problem, asked, "plain")


def _unless_wrong(name: str, title: str, problem: str, asked: str, other: str) -> str:
    """The kernel `name` if it has no problem or was asked for by name, else the other one; one line tells a problem."""
    if not problem:
        return name
    chosen = name if asked == name else other
    used = {name: f"model.attention {name} asks for it all the same", "jax_splash": "jax's own kernel is used"}
    say(
        f"{title} does not give on {device_kind()} what plain attention does: {problem}; "
        f"{used.get(chosen, 'plain attention is used')}"
    )
    return chosen


def _cudnn(q: Array, k: Array, v: Array, segments: Array, window: int, softcap: float) -> Array:
    return cudnn.cudnn_attention(q, k, v, segments, window)


def _splash(q: Array, k: Array, v: Array, segments: Array, window: int, softcap: float) -> Array:
    return splash.splash(q, k, v, segments, window=window, softcap=softcap)


def _plain(q: Array, k: Array, v: Array, segments: Array, window: int, softcap: float) -> Array:
    places = jnp.arange(segments.shape[1])[None]
    return attend(q, k, v, attention_mask(places, places, segments, segments, window), softcap)


BEST = {"tpu": "splash", "cpu": "blocks", "gpu": "cudnn"}
"""The kernel of each platform; plain on all others."""


def whole_rows(x: Float[Array, "B N T K"]) -> Float[Array, "B N T K"]:
    """Keys or values of all tokens of a row, gathered over the mesh axis `context`."""
    return constrain(constrain(x, "batch", "kv_heads", "length"), "batch", "kv_heads", None, None)


def attend(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N S K"],
    v: Float[Array, "B N S K"],
    mask: Bool[Array, "B T S"],
    softcap: float = 0.0,
) -> Float[Array, "B H T K"]:
    """Plain attention softmax(q·kᵀ/√K)·v, with H/N query heads for each key head and the softmax in float32.

    Args:
        softcap: scores become softcap·tanh(score / softcap); 0: no soft cap.
    Source: Attention is all you need (arXiv 1706.03762) eq. 1; GQA (arXiv 2305.13245); Gemma 2 (arXiv 2408.00118).
    """
    b, h, t, d = q.shape
    n, s = k.shape[1], k.shape[2]
    # The query heads of a group are stacked as rows, so that each key head has one matrix product.
    grouped = q.reshape(b, n, (h // n) * t, d)
    scores = _products(grouped, k) / math.sqrt(d)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores.reshape(b, n, h // n, t, s), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, n, (h // n) * t, s)
    return jnp.einsum("bnqs,bnsk->bnqk", weights, v).reshape(b, h, t, d)


@pytree
class PartialHeads:
    """Attention over a part of a query's keys: the sum of values, not normalised, and the softmax's maximum and total."""

    heads: Float[Array, "B H T K"]
    top: Float[Array, "B H T 1"]
    total: Float[Array, "B H T 1"]

    @property
    def normalised(self) -> Float[Array, "B H T K"]:
        """The heads, if all keys of the queries are in this part, and at least one of each is not masked."""
        return self.heads / self.total


def keys_turned() -> bool:
    """Whether blocks of cached keys have their tokens last: the products of few queries are several times as fast on CPU."""
    return platform() == "cpu"


def turned(x: Float[Array, "... S K"]) -> Float[Array, "..."]:
    """Keys as `keys_turned` says."""
    return jnp.swapaxes(x, -1, -2) if keys_turned() else x


def attend_partly(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N X K S"],
    v: Float[Array, "B N X S K"],
    mask: Bool[Array, "B _ C"],
    softcap: float = 0.0,
) -> PartialHeads:
    """`attend` over a part of the keys, in X blocks of S columns; blocks of keys are as `turned` gives them.

    Masked keys change no bit of the result. A query without a key in this part has a part without weight.
    """
    b, h, t, d = q.shape
    n, x, s = v.shape[1:4]
    grouped = q.astype(k.dtype).reshape(b, n, 1, (h // n) * t, d)
    shape = "bnxks" if keys_turned() else "bnxsk"
    scores = jnp.einsum(
        f"bnxqk,{shape}->bnxqs",
        jnp.broadcast_to(grouped, (b, n, x, *grouped.shape[3:])),
        k,
        preferred_element_type=_accumulator(q),
    ) / math.sqrt(d)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.swapaxes(mask.reshape(b, -1, x, s), 1, 2)[:, None, :, None]
    scores = jnp.where(seen, scores.reshape(b, n, x, h // n, t, s), -1e30)
    top = scores.max((2, 5), keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum((2, 5))
    rows = jnp.moveaxis(weights.astype(v.dtype), 2, 4).reshape(b, n, (h // n) * t, x * s)
    values = v.reshape(b, n, x * s, d)
    heads = jnp.einsum("bnqs,bnsk->bnqk", rows, values, preferred_element_type=_accumulator(q))
    return PartialHeads(heads.reshape(b, h, t, d), top.reshape(b, h, t, 1), total.reshape(b, h, t, 1))


def join_parts(one: PartialHeads, other: PartialHeads) -> PartialHeads:
    """Attention over the keys of two parts; a part in which all keys are masked changes no bit."""
    top = jnp.maximum(one.top, other.top)
    mine, its = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return PartialHeads(one.heads * mine + other.heads * its, top, one.total * mine + other.total * its)


def _products(q: Float[Array, "B N Q K"], k: Float[Array, "B N S K"]) -> Float[Array, "B N Q S"]:
    """Scores q·kᵀ in float32 or wider."""
    if platform() == "cpu" and q.shape[2] < FEW:
        return jnp.swapaxes(contract(k, q, 3), 2, 3)
    return jnp.einsum("bnqk,bnsk->bnqs", q, k, preferred_element_type=_accumulator(q))


FEW = 16
"""With fewer queries than this, the queries are the right operand of the product on CPU: XLA transposes the right operand, and
the keys are many more."""


def _accumulator(x: Array) -> jnp.dtype:
    """Dtype of sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(x.dtype, jnp.float32)
