"""Freed memory stays with a process or is given back, as it is told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lm.allocator import ALLOCATOR

# Frees 512 MB, and prints how many of them the process still has.
CODE = """
import resource, sys
import numpy as np
from lm.allocator import keep_freed_memory

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

for keep in sys.argv[1]:
    keep_freed_memory(keep == "k")
    before = used()
    pieces = [np.ones(64 << 20, np.int8) for _ in range(8)]
    del pieces
    print(used() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
@pytest.mark.parametrize(
    ("given", "kept"), [(ALLOCATOR, [True, False, True]), ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, [False] * 3)]
)
def test_freed_memory_is_kept_only_where_it_should_be(given, kept):
    """Settings that the user has chosen stay."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, "kgk"], env=os.environ | given, capture_output=True, text=True, check=True
    )
    assert [float(more) > 256 for more in done.stdout.split()] == kept, done.stdout
