"""Compiled programs kept on the disk, so that the next command on this machine does not compile them again."""

from __future__ import annotations

import os

import jax

from lm.data.cache import current_cache

FOLDER = "compiled"


def keep_compilations() -> None:
    """Keep what is compiled from here on in the cache's folder; what the environment or a caller has set already stays."""
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen or os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == "false":
        return
    folder = current_cache().folder / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: this command compiles, and so will the next
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
