"""Linear, a matrix with its product, and Embedding, a table: the products in the form that is fastest on each device.

On CPU both operands are reshaped to matrices: with two batch dimensions, the gradient of w contracts over both, for which XLA does
not use its fast matrix product (a SwiGLU layer then has half the speed). On TPU and GPU all dimensions are kept, so that a projection
writes directly into the layout that attention reads, and no reshape hides the split axis from the partitioner.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lm.model.parameter import axes_of, gather, normal, parameter
from lm.parallel.rules import constrain, one_device, platform


class Linear(nnx.Module):
    """x·w with an optional bias: every matrix of the blocks, and the head.

    The weight's dimensions are those of the input, then those of the output, with logical names. Heads are two
    dimensions, [heads, head_dim]; arrays with heads are head-major, [B H T K]. `lora` is the adapter of the current stage,
    `earlier` that of all earlier stages (`lm/model/lora.py`).
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        std: float,
        dtype: str,
        inputs: dict[str, int],
        outputs: dict[str, int],
        bias: bool = False,
    ):
        self.weight = normal(key, std, dtype, **inputs, **outputs)
        zeros = jnp.zeros(tuple(outputs.values()), jnp.dtype(dtype))
        self.bias = parameter(zeros, tuple(outputs)) if bias else None
        self.inputs = len(inputs)
        self.earlier: LowRank | None = nnx.data(None)
        self.lora: LowRank | None = nnx.data(None)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x·w in x's dtype, plus the low-rank terms: of earlier stages, which are frozen, and of the current stage (LoRA)."""
        y = multiply(x, self.weight)
        for factors in (self.earlier, self.lora):
            if factors is not None:
                y = y + factors(x)
                if factors.magnitude is not None:
                    gain = self.gain(factors)
                    y = (y.astype(gain.dtype) * of_outputs(gain)).astype(y.dtype)
        return y if self.bias is None else y + of_outputs(gather(self.bias, x.dtype))

    def entering(self) -> Float[Array, "..."]:
        """The weight with the factors of earlier stages, in float32 or wider."""
        w, factors = self.weight[...], self.earlier
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        if factors is None:
            return w
        return factors.added(w) if factors.magnitude is None else factors.added(w) * factors.magnitude[...]

    def effective(self) -> Float[Array, "..."]:
        """The weight with all factors, in float32 or wider."""
        w, factors = self.entering(), self.lora
        if factors is None:
            return w
        return factors.added(w) if factors.magnitude is None else factors.added(w) * self.gain(factors)

    def gain(self, factors: LowRank) -> Float[Array, "..."]:
        """DoRA's multiplier of each output; the norm of a column is treated as a constant (DoRA, sec. 4.3)."""
        assert factors.magnitude is not None
        if not factors.normed:
            return factors.magnitude[...]
        norms = column_norms(factors.added(self.entering()), self.inputs)
        return factors.magnitude[...] / jax.lax.stop_gradient(norms)


class LowRank(nnx.Module):
    """Low-rank factors beside the weight of a `Linear`: it becomes w + scale·a·b (LoRA, arXiv 2106.09685).

    a is [inputs, rank] and b [rank, outputs], with the dimensions of the weight. With a magnitude [outputs] each column of
    the sum then gets that norm (DoRA, arXiv 2402.09353) if it is `normed`; else the magnitude multiplies the column.
    """

    def __init__(
        self, a: nnx.Param, b: nnx.Param, scale: float = 1.0, magnitude: nnx.Param | None = None, normed: bool = True
    ):
        self.a, self.b, self.scale, self.magnitude, self.normed = a, b, scale, magnitude, normed

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """scale·x·a·b in x's dtype, the term that is added to x·w."""
        return multiply(multiply(x, self.a), parameter(self.b[...] * self.scale, axes_of(self.b)))

    def added(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """A weight with the product of the factors added."""
        return w + jnp.tensordot(self.a[...], self.b[...] * self.scale, 1)


def column_norms(w: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
    """The norm of the weights of each output, over the first `inputs` dimensions."""
    return jnp.sqrt(jnp.square(w).sum(tuple(range(inputs))))


def of_outputs(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """One value per output of a `Linear`, with dimensions that broadcast over rows and tokens; heads are head-major."""
    return x[:, None] if x.ndim == 2 else x


class Embedding(nnx.Module):
    """A row for each token of the vocabulary."""

    def __init__(self, key: PRNGKeyArray, std: float, dtype: str, vocab: int, embed: int):
        self.weight = normal(key, std, dtype, vocab=vocab, embed=embed)

    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        # Gathered over fsdp first, so that the looked-up rows are sharded like the batch.
        table = constrain(self.weight[...].astype(dtype), "vocab", "act_embed")
        return look_up(table, constrain(tokens, "batch", "length"))


class TransposedWeight(nnx.Module):
    """A weight as [outputs, inputs]: a CPU multiplies few rows by it up to twice as fast, on all its cores. For sampling only."""

    def __init__(self, weight: nnx.Param, inputs: int):
        self.names, self.shape = axes_of(weight), weight.shape
        self.rows = parameter(weight[...].reshape(math.prod(self.shape[:inputs]), -1).T, (None, None))

    def __getitem__(self, _: Any) -> Float[Array, "..."]:
        return self.rows[...].T.reshape(self.shape)

    def times(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x·w in x's dtype, like `multiply`."""
        flat = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1) if self.names[0] == "heads" else x
        y = self.project(flat, x.dtype)
        return y.reshape(*y.shape[:2], *self.shape[1:]).swapaxes(1, 2) if self.names[-1] == "head_dim" else y

    def project(self, x: Float[Array, "... I"], preferred: DTypeLike) -> Float[Array, "... O"]:
        """x·w over all leading dimensions of x, as `project`."""
        y = contract(x.reshape(-1, x.shape[-1]), self.rows[...].astype(x.dtype), 1)
        return y.reshape(*x.shape[:-1], -1).astype(preferred)


def transpose_weights(module: nnx.Module) -> None:
    """Replace the weights of a module's linear layers by `TransposedWeight`, in place; quantised weights stay."""
    for part in vars(module).values():
        if isinstance(part, Linear) and isinstance(part.weight, nnx.Param):
            rows: Any = TransposedWeight(part.weight, part.inputs)
            part.weight = rows
        elif isinstance(part, nnx.Module):
            transpose_weights(part)


def multiply(x: Float[Array, "..."], weight: Any) -> Float[Array, "..."]:
    """x·w in x's dtype, after gathering the weight; the names of its dimensions identify those of heads."""
    if isinstance(weight, TransposedWeight):
        return weight.times(x)
    names = axes_of(weight)
    product = project if len(names) == 2 else to_heads if names[-1] == "head_dim" else from_heads
    return product(x, gather(weight, x.dtype)) if isinstance(weight, nnx.Param) else _multiply_fixed(x, weight, product)


def _multiply_fixed(x: Float[Array, "..."], weight: Any, product: Callable[..., Array]) -> Float[Array, "..."]:
    """x·w of a quantised weight (`lm/model/quantised.py`), which has no gradient.

    The backward pass dequantises the weight again: otherwise a loop over layers would keep all dequantised weights until then.
    """
    shape, dtype = x.shape, x.dtype

    @jax.custom_vjp
    def multiplied(x: Array, weight: Any) -> Array:
        return product(x, weight.read(dtype))

    def forward(x: Array, weight: Any) -> tuple[Array, Any]:
        return multiplied(x, weight), weight

    def backward(weight: Any, dy: Array) -> tuple[Array, None]:
        _, of_x = jax.vjp(lambda x: product(x, weight.read(dtype)), jnp.zeros(shape, dtype))
        return *of_x(dy), None

    multiplied.defvjp(forward, backward)
    return multiplied(x, weight)


def project(
    x: Float[Array, "... I"], w: Float[Array, "I O"], preferred: DTypeLike | None = None
) -> Float[Array, "... O"]:
    """x·w over all leading dimensions of x.

    Args:
        preferred: dtype of the result; that of x if None.
    """
    if platform() == "cpu":
        flat = _matmul(x.reshape(-1, x.shape[-1]), w, preferred or x.dtype)
        return flat.reshape(*x.shape[:-1], w.shape[1])
    return jnp.einsum("...i,io->...o", x, w, preferred_element_type=preferred)


def to_heads(x: Float[Array, "B T D"], w: Float[Array, "D H K"]) -> Float[Array, "B H T K"]:
    """x·w, head-major."""
    if platform() == "cpu":
        flat = project(x, w.reshape(w.shape[0], -1))
        return flat.reshape(*x.shape[:2], *w.shape[1:]).swapaxes(1, 2)
    return jnp.einsum("btd,dhk->bhtk", x, w)


def from_heads(x: Float[Array, "B H T K"], w: Float[Array, "H K D"]) -> Float[Array, "B T D"]:
    """The concatenated heads of each token, times w."""
    if platform() == "cpu":
        merged = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
        return project(merged, w.reshape(-1, w.shape[-1]))
    return jnp.einsum("bhtk,hkd->btd", x, w)


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table. The gradients of a row, one for each occurrence of its token, are summed in float32 or wider.

    In bfloat16 a sum stops growing after some hundred terms, and frequent tokens have thousands.
    """
    if table.dtype == jnp.promote_types(table.dtype, jnp.float32):
        return table[tokens]
    return _look_up(table, tokens)


@jax.custom_vjp
def _look_up(table: Array, tokens: Array) -> Array:
    return table[tokens]


def _look_up_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[tokens], (table, tokens)


def _look_up_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, np.ndarray]:
    table, tokens = kept
    start = constrain(jnp.zeros(table.shape, jnp.float32), "vocab", "act_embed")
    summed = constrain(start.at[tokens].add(dy.astype(jnp.float32)), "vocab", "act_embed")
    return summed.astype(table.dtype), np.zeros(tokens.shape, jax.dtypes.float0)


_look_up.defvjp(_look_up_forward, _look_up_backward)


# ---- the product of two matrices on CPU --------------------------------------------------------------------------


def transposed(x: Float[Array, "... M N"]) -> Float[Array, "... N M"]:
    """x with its last two dimensions exchanged in memory, not only in the layout that XLA records.

    XLA's fast product on CPU needs a left operand that contracts on its last dimension. XLA would fold a plain transpose
    into the product, which is then two to three times slower in bfloat16; a reshape and a barrier prevent that.
    """
    y = jnp.swapaxes(x, -1, -2)
    if not one_device() or y.shape[-1] % 2:
        return y
    halves = y.reshape(*y.shape[:-1], y.shape[-1] // 2, 2)
    return jax.lax.optimization_barrier(halves).reshape(y.shape)


def contract(x: Float[Array, "... M J"], y: Array, axis: int) -> Array:
    """x over its last dimension times y over its dimension `axis`, for each of the dimensions before x's last two.

    Sum and result are in float32 or wider: a bfloat16 result halves the rate. The barrier keeps XLA from folding a
    transpose of the result into the product, which would be slow in float32 and unsupported in bfloat16.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    batch = tuple(range(x.ndim - 2))
    dimensions = (((x.ndim - 1,), (axis,)), (batch, batch))
    return jax.lax.optimization_barrier(jax.lax.dot_general(x, y, dimensions, preferred_element_type=wide))


NARROW = 4  # times as many inputs as outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Float[Array, "M I"], w: Float[Array, "I O"], dtype: DTypeLike) -> Float[Array, "M O"]:
    """x·w in `dtype`."""
    return contract(x, w, 0).astype(dtype)


def _matmul_forward(x: Array, w: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, w, dtype), (x, w)


def _matmul_backward(dtype: DTypeLike, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    dy = dy.astype(x.dtype)
    narrow = NARROW * w.shape[1] <= w.shape[0]  # then dy is cheaper to transpose than x, as for a factor of low rank
    dw = contract(transposed(dy), x, 0).swapaxes(0, 1) if narrow else contract(transposed(x), dy, 0)
    return contract(dy, w, 1).astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)
