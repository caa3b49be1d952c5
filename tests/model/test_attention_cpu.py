"""Attention in blocks on a CPU is the plain one, values and gradients, on packed rows of any length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model.attention import attend, attention_mask
from lm.model.kernels.attention_cpu import attend_in_blocks


def packed(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows of segments of several lengths, the last row padded at its end."""
    segments = np.sort(np.random.default_rng(0).integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segments[-1, length - length // 3 :] = 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    return (np.arange(length)[None] - starts).astype(np.int32), segments


@functools.partial(jax.jit, static_argnums=0)  # one compilation instead of one for every operation and shape
def values_and_gradients(attention, q, k, v, d_out):
    out, back = jax.vjp(attention, q, k, v)
    return out, *back(d_out)


@pytest.mark.parametrize("length", [7, 128, *(pytest.param(n, marks=pytest.mark.slow) for n in (300, 2100))])
def test_attention_in_blocks_is_the_plain_one(length):
    rows, heads, kv_heads, head_dim = (2, 4, 2, 16) if length < 1000 else (1, 2, 1, 8)
    positions, segments = packed(rows, length)
    keys = jax.random.split(jax.random.key(1), 4)
    q, d_out = (jax.random.normal(k, (rows, heads, length, head_dim)) for k in keys[:2])
    k, v = (jax.random.normal(k, (rows, kv_heads, length, head_dim)) for k in keys[2:])
    mask = attention_mask(positions, positions, segments, segments)
    real = jnp.asarray(segments > 0)[:, None, :, None]  # what padding looks at is nobody's business

    def plain(q, k, v):
        return jnp.where(real, attend(q, k, v, mask), 0)

    def blocks(q, k, v):
        return jnp.where(real, attend_in_blocks(q, k, v, segments), 0)

    (want, *want_back), (have, *have_back) = (values_and_gradients(f, q, k, v, d_out) for f in (plain, blocks))
    np.testing.assert_allclose(have, want, atol=2e-6)
    for have_d, want_d in zip(have_back, want_back, strict=True):
        np.testing.assert_allclose(have_d, want_d, atol=2e-5)


@pytest.mark.parametrize("queries", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 40)), 170])
def test_the_last_queries_alone_are_those_of_all(queries):
    length = 210
    _, segments = packed(2, length)
    keys = jax.random.split(jax.random.key(3), 4)
    q, d_out = (jax.random.normal(k, (2, 4, length, 16)) for k in keys[:2])
    k, v = (jax.random.normal(k, (2, 2, length, 16)) for k in keys[2:])
    d_out = d_out.at[:, :, :-queries].set(0)
    want, *want_back = values_and_gradients(lambda *x: attend_in_blocks(*x, segments), q, k, v, d_out)
    have, *have_back = values_and_gradients(
        lambda q, k, v: attend_in_blocks(q[:, :, -queries:], k, v, segments), q, k, v, d_out[:, :, -queries:]
    )
    np.testing.assert_allclose(have, want[:, :, -queries:], atol=2e-6)
    for have_d, want_d in zip(have_back, want_back, strict=True):
        np.testing.assert_allclose(have_d, want_d, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [100, 200])  # one block, and two
def test_bfloat16_is_as_near_to_float32_as_the_plain_one(length):
    positions, segments = packed(2, length)
    keys = jax.random.split(jax.random.key(2), 3)
    q, k, v = (jax.random.normal(key, (2, n, length, 32)) for key, n in zip(keys, (4, 2, 2), strict=True))
    mask = attention_mask(positions, positions, segments, segments)
    exact = jax.grad(lambda *x: jnp.square(attend(*x, mask)).sum(), argnums=(0, 1, 2))(q, k, v)
    narrow = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))

    def error(attention):
        loss = jax.grad(lambda *x: jnp.square(attention(*x).astype(jnp.float32)).sum(), argnums=(0, 1, 2))
        got = jax.jit(loss)(*narrow)
        return max(
            float(jnp.linalg.norm(g.astype(jnp.float32) - e) / jnp.linalg.norm(e))
            for g, e in zip(got, exact, strict=True)
        )

    blocks = error(lambda *x: attend_in_blocks(*x, segments))
    assert blocks < 1.5 * error(lambda *x: attend(*x, mask)) < 0.03
