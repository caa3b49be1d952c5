"""Quantised weights of a frozen base model: int8 with one scale per output, and NF4 (4 bits) with double quantisation."""

from __future__ import annotations

import fnmatch
import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lm.experiment import UserError
from lm.model.lora import APART, linears
from lm.model.parameter import axes_of, gather, leaf_name, parameter
from lm.parallel.rules import shardings

M = TypeVar("M", bound=nnx.Module)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of the 16 codes, 4-bit NormalFloat (QLoRA, arXiv 2305.14314, sec. 3 and appendix E).

Q is the quantile function of the normal distribution, and δ = 0.9677083. The positive values are Q(p)/Q(δ) at 8 equally spaced
p from δ down to 1/2 (excluded), the negative ones -Q(p)/Q(δ) at 7. Normally distributed weights use all codes about equally
often, and 0 is exact.
"""
BLOCK, GROUP = 64, 256
"""Maximum number of weights that share a scale, and of scales that share a step; the largest divisor of the dimension up to it
is used."""


class Int8Weight(nnx.Module):
    """w ≈ scale·code, with codes within ±127; the scale of an output is the largest |w| of its inputs, divided by 127."""

    def __init__(self, weight: nnx.Param, inputs: int):
        w, names = weight[...].astype(jnp.float32), axes_of(weight)
        of_inputs = tuple(range(inputs))
        scale = _nonzero(jnp.abs(w).max(of_inputs, keepdims=True)) / 127
        self.codes = parameter(jnp.round(w / scale).astype(jnp.int8), names)
        self.scale = parameter(scale, tuple(None if axis in of_inputs else name for axis, name in enumerate(names)))
        self.dtype = weight.dtype  # of the original weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read(self, dtype: Any) -> Float[Array, "..."]:
        """The weight in `dtype`, gathered from all devices as codes of one byte."""
        codes, scale = gather(self.codes, jnp.int8), gather(self.scale, jnp.float32)
        return (codes * scale).astype(dtype)

    def __getitem__(self, _: Any) -> Float[Array, "..."]:
        return self.read(jnp.float32)


class NF4Weight(nnx.Module):
    """w ≈ scale·NF4[code]; the scale is the largest |w| of a block along the last dimension of the input.

    Scales are quantised to int8: scale ≈ middle + step·code, with middle and step in float32 for each group along the last
    dimension of the output. QLoRA subtracts the mean of all scales instead of the middle of a group's range; the middle halves
    the error, and a second quantisation changes nothing. A byte holds two codes, the first in its upper half: 4.13 bits a weight.
    """

    def __init__(self, weight: nnx.Param, inputs: int):
        w, names = weight[...].astype(jnp.float32), axes_of(weight)
        axis = inputs - 1
        if w.shape[axis] % 2:
            raise UserError(f"lora.base nf4 packs two weights in a byte; {names[axis]} {w.shape[axis]} should be even")
        blocks = _split(w, axis, 2 * _divisor(w.shape[axis] // 2, BLOCK // 2))
        largest = jnp.abs(blocks).max(axis + 1)
        edges = jnp.asarray([(a + b) / 2 for a, b in itertools.pairwise(NF4)], jnp.float32)
        codes = jnp.searchsorted(edges, blocks / jnp.expand_dims(_nonzero(largest), axis + 1), method="compare_all")
        pairs = _split(codes.reshape(w.shape).astype(jnp.uint8), axis, 2)
        self.codes = parameter(pairs.take(0, axis + 1) << 4 | pairs.take(1, axis + 1), names)
        groups = _split(largest, w.ndim - 1, _divisor(w.shape[-1], GROUP))
        low, high = groups.min(-1), groups.max(-1)
        middle, step = (low + high) / 2, _nonzero(high - low) / 254
        scales = jnp.round((groups - middle[..., None]) / step[..., None]).astype(jnp.int8)
        self.scales = parameter(scales.reshape(largest.shape), names)
        self.middle, self.step = (parameter(x, (*names[:-1], None)) for x in (middle, step))
        self.axis, self.dtype = axis - w.ndim, weight.dtype  # from the end: scanning removes the axis of layers

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 2
        return tuple(shape)

    def read(self, dtype: Any) -> Float[Array, "..."]:
        """The weight in `dtype`, gathered from all devices as codes of half a byte."""
        codes, scales = gather(self.codes, jnp.uint8), gather(self.scales, jnp.int8)
        middle, step = (gather(one, jnp.float32)[..., None] for one in (self.middle, self.step))
        axis = codes.ndim + self.axis
        groups = _split(scales, scales.ndim - 1, scales.shape[-1] // middle.shape[-2])
        scale = (middle + step * groups).reshape(scales.shape)
        w = _nf4(jnp.stack([codes >> 4, codes & 15], axis + 1)).reshape(self.shape)
        blocks = _split(w, axis, w.shape[axis] // scale.shape[axis])
        return (blocks * jnp.expand_dims(scale, axis + 1)).astype(dtype).reshape(w.shape)

    def __getitem__(self, _: Any) -> Float[Array, "..."]:
        return self.read(jnp.float32)


QUANTISED = {"int8": Int8Weight, "nf4": NF4Weight}
"""LoRA.base -> storage of the blocks' weights."""


def set_base(model: M, base: str, mesh: Mesh | None = None) -> M:
    """Convert a model's weights in place to the storage `base` of `LoRA.base`, and return the model.

    The blocks' weights are quantised (unless `base` is bfloat16), other matrices become bfloat16. Weights are replaced one at a
    time, so that memory never holds a second copy of all. Weights that are already quantised stay unchanged.
    """
    if base == "model":
        return model
    for path, linear in linears(model):
        if isinstance(linear.weight, nnx.Param):
            linear.weight = stored(f"{path}/weight", linear.weight, linear.inputs, base, mesh)
    for keys, param in jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Param)):
        if (new := stored(leaf_name(keys), param, 0, base, mesh)) is not param:
            param.set_value(new[...])
    return model


def stored(name: str, param: nnx.Param, inputs: int, base: str, mesh: Mesh | None = None) -> Any:
    """A parameter in the storage `base` of `LoRA.base`: Linears of the blocks quantised, other matrices in bfloat16.

    Vectors, and parameters that train beside an adapter, stay unchanged.

    Args:
        inputs: number of leading input dimensions of a Linear's weight.
    """
    is_matrix = name.endswith("weight") and not any(fnmatch.fnmatchcase(name, one) for one in APART)
    if not is_matrix:
        return param
    if base not in QUANTISED or "blocks/" not in name:
        return parameter(param[...].astype(jnp.bfloat16), axes_of(param))
    quantise = functools.partial(_quantised, QUANTISED[base], inputs)
    places = shardings(jax.eval_shape(quantise, param), mesh) if mesh is not None else None
    return jax.jit(quantise, out_shardings=places)(param)


def dequantised(model: M) -> M:
    """The model with its quantised weights as parameters in their original dtype; other arrays are shared."""
    model = jax.tree.map(lambda x: x, model)
    for _, linear in linears(model):
        if not isinstance(linear.weight, nnx.Param):
            names, read = axes_of(linear.weight), functools.partial(_read, linear.weight.dtype)
            value = jax.lax.map(read, linear.weight) if names[0] == "layers" else read(linear.weight)
            linear.weight = parameter(value, names)
    return model


def _read(dtype: Any, weight: Any) -> Array:
    return weight.read(dtype)


def _quantised(make: Callable[..., Any], inputs: int, weight: nnx.Param) -> Any:
    """A quantised weight; stacked layers are quantised one by one, so that the float32 intermediates stay small."""
    names = axes_of(weight)
    if names[0] != "layers":
        return make(weight, inputs)
    stacked = jax.lax.map(lambda one: make(parameter(one, names[1:]), inputs), weight[...])
    return jax.tree.map(
        lambda part: parameter(part[...], ("layers", *part.get_metadata("out_sharding"))),
        stacked,
        is_leaf=lambda part: isinstance(part, nnx.Variable),
    )


def _nf4(codes: Int[Array, "..."]) -> Float[Array, "..."]:
    """NF4[codes], by selecting on the bits of the codes: unlike table look-ups, selections are vector operations on every device.

    The barrier makes the 16 values depend on the codes; otherwise a scan broadcasts them before its loop and keeps the copies.
    """
    table, codes = jax.lax.optimization_barrier((jnp.asarray(NF4, jnp.float32), codes))
    values = list(table)
    for bit in (1, 2, 4, 8):
        values = [jnp.where(codes & bit, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _split(x: Array, axis: int, size: int) -> Array:
    """x with a dimension split into two: pieces, and the `size` elements of a piece."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _divisor(size: int, most: int) -> int:
    return next(number for number in range(min(size, most), 0, -1) if size % number == 0)


def _nonzero(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x with 1 in place of 0, as a divisor of values that are 0 there."""
    return jnp.where(x > 0, x, 1)
