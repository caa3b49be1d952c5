"""Reads parameters from the tensors of a checkpoint into sharded arrays, a few megabytes at a time."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.experiment import UserError
from lm.interop.places import Place
from lm.interop.tensors import DTYPES, Tensor, broken_values

COLUMNS = 2048  # columns of a block transposed at a time
MOST_THREADS = 4
TASK = 32 * 2**20  # bytes of a tensor that one thread reads

Index = tuple[slice, ...]


def read_array(place: Place, tensors: Mapping[str, Tensor], sharding: NamedSharding | None) -> jax.Array:
    """A parameter read from its tensors; each process reads only its own shards. Without a sharding: on the default device.

    On a CPU, tensors are read directly into the memory of the array; for other devices, host memory holds one layer at a time.

    Raises:
        UserError: a file is cut short, or a value is not finite in the parameter's dtype.
    """
    shape = (len(place.names), *place.shape) if place.stacked else place.shape
    if sharding is None:
        return jax.device_put(_filled(place, tensors, tuple(map(slice, shape))))
    if jax.default_backend() == "cpu":
        return jax.make_array_from_callback(shape, sharding, functools.partial(_filled, place, tensors))
    return on_devices(place, tensors, sharding)


def on_devices(place: Place, tensors: Mapping[str, Tensor], sharding: NamedSharding) -> jax.Array:
    """A parameter whose layers are copied one by one to the devices, where they are cast and stacked."""
    axes = sharding.spec[1:] if place.stacked else sharding.spec
    inner = NamedSharding(sharding.mesh, PartitionSpec(*axes))

    def layer(name: str) -> jax.Array:
        return jax.make_array_from_callback(place.shape, inner, functools.partial(_part, place, tensors, name))

    if not place.stacked:
        return jax.jit(lambda x: x.astype(place.dtype), out_shardings=sharding)(layer(place.names[0]))
    shape = (len(place.names), *place.shape)
    stack = jax.jit(lambda: jnp.zeros(shape, place.dtype), out_shardings=sharding)()
    for number, name in enumerate(place.names):
        stack = _with_layer(stack, layer(name), number)
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), number, 0)


def _part(place: Place, tensors: Mapping[str, Tensor], name: str, index: Index) -> np.ndarray:
    """A part of one layer, in the narrower of the file's dtype and the parameter's."""
    part = place.part(index)
    dtype = _narrower(tensors[name], place.dtype)
    values = np.empty([one.stop - one.start for one in part], dtype)
    for first, block in _blocks(name, tensors[name], part, place.dtype):
        values[first : first + len(block)] = block
    return place.shaped(values, index)


def _filled(place: Place, tensors: Mapping[str, Tensor], index: Index) -> np.ndarray:
    """A part of a parameter, all layers together, in memory that jax uses on a CPU without a copy."""
    names, inner = (place.names[index[0]], index[1:]) if place.stacked else (place.names, index)
    part = place.part(inner)
    shape = tuple(len(range(*one.indices(size))) for one, size in zip(inner, place.shape, strict=True))
    # Small pages have the alignment that jax needs; allocating the huge pages that numpy requests takes several times as long.
    size = len(names) * math.prod(shape) * place.dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, place.dtype).reshape(len(names), *shape)

    rows = part[0].stop - part[0].start
    some = max(1, rows * TASK * len(names) // size)

    def fill(task: tuple[int, int]) -> None:
        number, start = task
        name, layer, stop = names[number], whole[number], min(start + some, rows)
        target = layer.reshape(-1, rows).T if place.inputs else layer.reshape(rows, -1)
        inside = (slice(part[0].start + start, part[0].start + stop), *part[1:])
        for first, block in _blocks(name, tensors[name], inside, place.dtype):
            _copy(target[start + first : start + first + len(block)], block.reshape(len(block), -1))

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, itertools.product(range(len(names)), range(0, rows, some))))
    return whole if place.stacked else whole[0]


def _copy(target: np.ndarray, block: np.ndarray) -> None:
    """Copy a block [out, in] into an array that may be transposed; jax transposes, ten times as fast as numpy."""
    if target.flags.c_contiguous:
        _assign(target, block)
        return
    for start in range(0, block.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        _assign(target.T[columns], np.asarray(jax.device_put(block[:, columns].T)))


def _assign(target: np.ndarray, values: np.ndarray) -> None:
    if (values.dtype, target.dtype) == (ml_dtypes.bfloat16, np.float32):  # four times as fast as a cast
        np.left_shift(values.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = values


def _narrower(tensor: Tensor, dtype: np.dtype) -> np.dtype:
    """The narrower of the dtype of a tensor's file and `dtype`; `dtype` if they are equally wide."""
    return min(dtype, DTYPES[tensor.dtype], key=lambda one: one.itemsize)


def _blocks(name: str, tensor: Tensor, part: Index, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, values) of a part of a tensor, in the narrower of the file's dtype and `dtype`.

    Raises:
        UserError: after the last block, if a value was not finite.
    """
    narrow = _narrower(tensor, dtype)
    broken = count = 0
    for start, block in tensor.blocks(part):
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is counted below
            block = block.astype(narrow, copy=False)
        broken, count = broken + broken_values(block), count + block.size
        yield start, block
    if broken:
        raise UserError(f"{tensor.file}: {name} has {broken} of {count} values that are not finite in {dtype}")
