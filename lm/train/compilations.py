"""The persistent compilation cache, so that the next command on this machine does not compile again."""

from __future__ import annotations

import os

import jax

from lm.data.cache import current_cache

FOLDER = "compiled"


def keep_compilations() -> None:
    """Enable jax's compilation cache in the data cache's folder, unless the environment or a caller has set one."""
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
