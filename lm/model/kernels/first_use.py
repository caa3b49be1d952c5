"""Check of an attention kernel against plain attention on a small input, the first time a kind of device is used.

The kernel may never have run on a device of this kind, so its values and gradients are compared with those of plain attention.
The result is stored in the cache folder, by device kind, versions of jax and of its runtime, and the kernel's
source, so that the check takes its seconds only once.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lm.experiment import UserError
from lm.parallel.distributed import is_main_process
from lm.shapes import is_list, is_text
from lm.stored import cache_folder, make_folder, read_record, write_sealed

# (queries, keys, values, segments, window, softcap) -> heads
Attention = Callable[[Array, Array, Array, Array, int, float], Array]
CASES = ((0, 0.0), (200, 2.0))  # window, softcap
WITHOUT_SOFTCAP = ((0, 0.0), (200, 0.0))
LENGTH, HEADS, KV_HEADS, WIDTH = 1024, 4, 2, 128
LARGEST_ERROR = 0.02
"""Largest allowed root mean square of the differences, relative to that of the values; bfloat16 rounding gives 0.003 to 0.006."""


def kernel_problem(
    platform: str,
    kernel: Attention,
    plain: Attention,
    sources: tuple[ModuleType, ...],
    cases: tuple[tuple[int, float], ...] = CASES,
) -> str:
    """Why the kernel must not be used on this process's devices; empty if it is correct or they are not of this platform.

    Args:
        sources: modules of the kernel; if one changes, the kernel is checked again.
        cases: windows and soft caps to check.
    """
    if jax.default_backend() != platform:  # a plan for devices that are not here
        return ""
    device = jax.local_devices()[0]
    return _remembered(device.device_kind, device.client.platform_version, kernel, plain, sources, cases)


@functools.cache
def _remembered(
    kind: str,
    runtime: str,
    kernel: Attention,
    plain: Attention,
    sources: tuple[ModuleType, ...],
    cases: tuple[tuple[int, float], ...] = CASES,
) -> str:
    source = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in sources)
    made_of = [kind, jax.__version__, runtime, hashlib.sha256(source.encode()).hexdigest()]
    folder = cache_folder() / "kernels"
    file = folder / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.json"
    try:
        return read_record(file, {"made_of": is_list, "problem": is_text})["problem"]
    except UserError:  # missing or damaged: check again
        problem = measured_problem(kernel, plain, cases)
    try:
        make_folder(folder, "--cache DIR")
        write_sealed(file, {"made_of": made_of, "problem": problem})
    except (UserError, OSError) as error:
        say(f"the check of the attention kernel is not remembered: {error}")
    return problem


def measured_problem(kernel: Attention, plain: Attention, cases: Sequence[tuple[int, float]] = CASES) -> str:
    """Why the kernel disagrees with plain attention, as measured; empty if they agree.

    The check runs in a separate thread, which does not share this thread's trace and mesh.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_compare, kernel, plain, cases).result()


def _compare(kernel: Attention, plain: Attention, cases: Sequence[tuple[int, float]]) -> str:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((1, heads, LENGTH, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    q, k, v, weights = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    segments = (jnp.arange(LENGTH)[None] >= LENGTH * 2 // 5).astype(jnp.int32) + 1  # two documents

    for window, softcap in cases:
        try:
            found = _with_gradients(kernel, (q, k, v), segments, weights, window, softcap)
            wide = [x.astype(jnp.float32) for x in (q, k, v)]
            right = _with_gradients(plain, wide, segments, weights, window, softcap)
            errors = [_error(ours, theirs) for ours, theirs in zip(found, right, strict=True)]
        except Exception as wrong:  # the kernel's compiler may raise anything
            return f"it fails: {type(wrong).__name__}: {' '.join(str(wrong).split())[:200]}"
        for name, off in zip(("values", "dq", "dk", "dv"), errors, strict=True):
            if not off <= LARGEST_ERROR:  # also true for NaN
                return f"its {name} are {off:.2g} of their size off (window {window}, softcap {softcap:g})"
    return ""


def _with_gradients(
    attention: Attention, inputs: Sequence[Array], segments: Array, weights: Array, window: int, softcap: float
) -> tuple[Array, ...]:
    """Heads, and the gradients of their weighted sum by queries, keys and values."""

    def run(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        heads, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, window, softcap), q, k, v)
        return heads, *pull(weights.astype(heads.dtype))

    return jax.jit(run)(*inputs)


def _error(found: Array, right: Array) -> float:
    """Root mean square of the differences, relative to that of the expected values."""
    a, b = (np.asarray(x, np.float64) for x in (found, right))
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@functools.cache
def say(line: str) -> None:
    """Print a line once per process, in the main process only."""
    if is_main_process():
        print(f"lm: {line}", file=sys.stderr)
