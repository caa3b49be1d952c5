"""Arrays of a checkpoint by name (`blocks/attn/q`), written and read by orbax."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.model.parameter import leaf_name

PyTree = Any
Named = dict[str, dict[str, Any]]
"""Arrays by item and name."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Flatten a tree to {path: leaf}, with paths such as `blocks/attn/q` (`leaf_name`)."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = leaf_name(path)
        if name in named:
            raise ValueError(f"two leaves of the tree are both called {name!r}")
        named[name] = leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)
    return named


def _nest(named: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = functools.reduce(lambda at, key: at.setdefault(key, {}), parents, nested)
        node[last] = leaf
    return nested


def rebuild(item: str, tree: PyTree, loaded: dict[str, Any]) -> PyTree:
    """Rebuild an item's tree with each leaf replaced by the one that was loaded under its full name."""
    return jax.tree.unflatten(jax.tree.structure(tree), [loaded[f"{item}/{name}"] for name in named_leaves(tree)])


def part_of(arrays: Named, wanted: Callable[[str], bool]) -> Named:
    """The arrays whose full name, `ITEM/NAME`, is wanted, without items that have none left."""
    parts = {item: {name: x for name, x in named.items() if wanted(f"{item}/{name}")} for item, named in arrays.items()}
    return {item: named for item, named in parts.items() if named}


def full_names(items: dict[str, dict[str, str]]) -> set[str]:
    return {f"{item}/{name}" for item, named in items.items() for name in named}


def write_arrays(path: Path, arrays: Named) -> Any:
    """Start to write arrays with orbax; returns what waits for the end."""
    ocp = _orbax()
    with _writing(ocp):
        return ocp.save_checkpointables_async(path, {item: _nest(named) for item, named in arrays.items()})


def read_arrays(path: Path, wanted: Named) -> dict[str, Any]:
    """Read arrays with orbax, by full name."""
    targets = {item: _nest({k: _target(v) for k, v in named.items()}) for item, named in wanted.items()}
    loaded = _orbax().load_checkpointables(path, targets) if targets else {}
    return {
        f"{item}/{name}": functools.reduce(lambda at, key: at[key], name.split("/"), loaded[item])
        for item, named in wanted.items()
        for name in named
    }


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def signature(named: dict[str, Any]) -> dict[str, str]:
    """Name → "float32[6, 256]"."""
    return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in named.items()}


@functools.cache
def _orbax() -> Any:
    """Import orbax lazily and silence its error log, which repeats the exceptions that it raises."""
    import orbax.checkpoint.experimental.v1 as ocp

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno > logging.ERROR)
    return ocp


def _writing(ocp: Any) -> contextlib.AbstractContextManager[Any]:
    """Orbax options for saving: no compression, small arrays whole, and folders created before `save` returns.

    Compressing weights takes five times the CPU time and saves a twelfth of the bytes. Replicas share the writing of an
    array, for which each compiles a slice of each shape: of less than a megabyte that takes longer. If folders are created
    asynchronously, a failure to create them leaves threads that wait for ever.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    context.asynchronous.create_directories_asynchronously = False
    return context
