"""Attention by a kernel of one device, on each device's rows and heads of the current mesh."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from lm.parallel.rules import spec


def on_each_device(
    attend: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B H T K"]:
    """`attend(q, k, v, segments)` on every device for its part; for a mesh that does not split rows."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, segments)
    queries, keys, rows = (spec(names) for names in (("batch", "heads"), ("batch", "kv_heads"), ("batch",)))
    mapped = jax.shard_map(attend, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)
    return mapped(q, k, v, segments)
