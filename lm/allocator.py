"""Settings of the C library's memory allocator: keep what a training step frees for the next one, or give it back."""

from __future__ import annotations

import ctypes
import os

# What the C library reads before the interpreter starts: memory in huge pages, and given back to no one between two steps,
# which use the same again. A training step on a CPU takes tens of thousands of page faults without, and a seventh to a third
# more CPU time (see benchmarks/README.md).
ALLOCATOR = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}"
        for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=100000000000", "arena_max=1", "top_pad=67108864")
    )
}

# Parameters of mallopt(3) by their numbers in <malloc.h>, and two sets of values.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # -1: never
GIVE_BACK = {MMAP_MAX: 1 << 16, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


def keep_freed_memory(keep: bool) -> None:
    """Choose whether freed memory stays with this process; nothing where the process did not start with ALLOCATOR.

    The heap of memory that is kept has gaps between what is in use, half of it or more where activations are most of the memory,
    as in training an adapter.
    """
    library = ctypes.CDLL(None)
    if not ALLOCATOR.items() <= os.environ.items() or not hasattr(library, "mallopt"):
        return
    for parameter, value in (KEEP if keep else GIVE_BACK).items():
        library.mallopt(parameter, value)
    if not keep:
        library.malloc_trim(0)
