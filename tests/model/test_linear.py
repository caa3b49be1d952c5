"""The product of two matrices on CPU: values and gradients of the plain one, in the dtype that was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model.linear import Linear, TransposedWeight, from_heads, look_up, project, to_heads, transposed


def operands(rows: int, outputs: int = 8) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, rows, 6), (6, outputs), (2, rows, outputs))
    x, w, dy = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x, w, dy


@pytest.mark.parametrize("outputs", [8, 1])  # few outputs, as a factor of low rank has, are multiplied in another order
@pytest.mark.parametrize("rows", [1, 3, 4])  # an odd number of rows too
def test_gradients_are_those_of_the_plain_product(rows, outputs):
    x, w, dy = operands(rows, outputs)
    (want, back), (have, back_project) = jax.vjp(jnp.matmul, x, w), jax.vjp(project, x, w)
    np.testing.assert_allclose(have, want, atol=1e-6)
    for have_d, want_d in zip(back_project(dy), back(dy), strict=True):
        np.testing.assert_allclose(have_d, want_d, atol=1e-6)


def test_bfloat16_operands_add_up_in_float32():
    x, w, dy = operands(64)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    y, back = jax.vjp(lambda x, w: project(x, w, preferred=jnp.float32), x, w)
    dx, dw = back(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert project(x, w).dtype == jnp.bfloat16
    exact = np.einsum("bti,io->bto", np.asarray(x, np.float64), np.asarray(w, np.float64))
    np.testing.assert_allclose(y, exact, atol=1e-5)


def test_the_gradient_of_a_transposed_bfloat16_matrix_compiles():
    """A tied head is one. XLA has no product on CPU that writes its result transposed."""
    x, w, _ = operands(64)
    x, table = x.astype(jnp.bfloat16), w.T.astype(jnp.bfloat16)

    def loss(project):
        return jax.jit(jax.grad(lambda table: jnp.square(project(x, table.T).astype(jnp.float32)).sum()))(table)

    np.testing.assert_allclose(
        np.asarray(loss(project), np.float32), np.asarray(loss(jnp.matmul), np.float32), rtol=0.05, atol=0.5
    )


def test_heads_lie_as_the_einsum_says():
    x, w, _ = operands(3)
    w = w.reshape(6, 2, 4)
    heads = to_heads(x, w)
    np.testing.assert_allclose(heads, jnp.einsum("btd,dhk->bhtk", x, w), atol=1e-6)
    out = jnp.swapaxes(w.reshape(6, 8), 0, 1).reshape(2, 4, 6)
    np.testing.assert_allclose(from_heads(heads, out), jnp.einsum("bhtk,hkd->btd", heads, out), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (2, 3, 4)])
def test_transposed_is_the_transpose(shape):
    x = jnp.arange(np.prod(shape)).reshape(shape)
    assert jnp.array_equal(jax.jit(transposed)(x), jnp.swapaxes(x, -1, -2))


def test_a_row_that_is_looked_up_often_has_the_gradient_of_float32():
    """In bfloat16 a sum of thousands of like terms would stop at some hundreds."""
    tokens = jnp.arange(8 * 512).reshape(8, 512) % 3
    table, dy = jnp.ones((5, 4)), jax.random.uniform(jax.random.key(0), (8, 512, 4))

    def gradient(dtype):
        loss = lambda t: (look_up(t, tokens).astype(jnp.float32) * dy).sum()  # noqa: E731
        return jax.grad(loss)(table.astype(dtype))

    narrow, exact = gradient(jnp.bfloat16), gradient(jnp.float32)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), exact, rtol=2**-8)
    np.testing.assert_array_equal(exact[3:], 0)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [("embed", "mlp"), ("embed", "heads head_dim"), ("heads head_dim", "embed")]
)
def test_a_transposed_weight_has_the_product_of_the_weight(inputs, outputs):
    sizes = {"embed": 128, "mlp": 190, "heads": 4, "head_dim": 16}
    sides = ({name: sizes[name] for name in side.split()} for side in (inputs, outputs))
    linear = Linear(jax.random.key(0), 1.0, "float32", *sides)
    shape = (3, 1, sizes["embed"]) if inputs == "embed" else (3, 4, 1, sizes["head_dim"])
    x, weight = jax.random.normal(jax.random.key(1), shape), linear.weight[...]
    expected = linear(x)
    linear.weight = TransposedWeight(linear.weight, linear.inputs)
    np.testing.assert_allclose(linear(x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(linear.weight[...], weight)
