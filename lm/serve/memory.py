"""Memory of a server: weights, and the cache of its slots, which determine how long a context can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from lm.experiment import UserError
from lm.model.transformer import Transformer
from lm.parallel.rules import platform
from lm.rollout.slots import empty_reader, empty_slots
from lm.serve.slot_engine import EngineSizes
from lm.train.memory import device_memory

LENGTH, NEW = 2048, 1024  # tokens of a context and of a completion, unless the model has fewer or they are given
LEAST_LENGTH = 256  # to which a context is shortened where memory is short
SHARE = 0.125  # of a device's memory that the caches of all models get, unless the length is given
SLOTS = {"cpu": 40}
MOST_SLOTS = 64  # on other devices
LIBRARIES = 0.6e9  # bytes of Python, its libraries and the compiled programs


@dataclass(frozen=True)
class ServingMemory:
    """Bytes of a model's weights, in the dtype of sampling, and of the cache of its slots."""

    weights: int
    cache: int

    def __str__(self) -> str:
        return f"weights {self.weights / 1e9:.2f} GB, cache {self.cache / 1e9:.2f} GB"


def default_slots() -> int:
    """The number of slots of a model that suits this kind of device."""
    return SLOTS.get(platform(), MOST_SLOTS)


def memory_of(model: Transformer, sizes: EngineSizes) -> ServingMemory:
    """The memory of a model, which may be abstract."""
    sampled = jax.eval_shape(Transformer.for_sampling, model)
    slots = jax.eval_shape(lambda m: empty_slots(m, sizes.slots, sizes.slots, sizes.prompt, sizes.new), sampled)
    reader = jax.eval_shape(lambda m: empty_reader(m, 1, sizes.prompt), sampled)
    return ServingMemory(_bytes(sampled), _bytes(slots) + 2 * _bytes(reader))


def sizes_for(model: Transformer, slots: int, length: int = 0, new: int = 0, models: int = 1) -> EngineSizes:
    """The sizes of an engine; a length that is 0 is the model's context, at most LENGTH, less if the cache gets too large.

    Args:
        models: number of models that share the memory.

    Raises:
        UserError: a length is larger than the model's context.
    """
    longest = model.config.max_len
    if length > longest:
        raise UserError(f"--length is {length}; the model's context is {longest} tokens")
    tried = length or min(longest, LENGTH)
    if new >= tried:
        raise UserError(f"--max-new-tokens is {new}; it should be less than the context, {tried} tokens")
    while True:
        sizes = EngineSizes(slots, tried, new or min(max(1, tried // 2), NEW))
        shorter = max(tried // 2, LEAST_LENGTH, new + 1)
        fits = memory_of(model, sizes).cache <= SHARE * device_memory() / models
        if fits or length or shorter >= tried:
            return sizes
        tried = shorter


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
