"""FLOPs of attention kernels, which neither compiler nor trace reports, and assumed rates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

HOST_RATE = 16e9  # bytes/s between a device and its host's memory
# FLOPs of a splash-attention kernel per query, key and head dimension. A fused backward kernel computes the gradients of
# q, k and v; the module then has no kernel for dq.
SPLASH = {"fwd": 4, "dq": 6, "dkv": 8, "fused": 10}


KERNEL_EFFICIENCY = 0.5  # assumed fraction of the peak that attention kernels reach (0.4 to 0.7 is usual)


def splash_flops(name: str, arrays: Sequence[Sequence[int]], notes: str, fused_backward: bool) -> float:
    """FLOPs of one call of a splash-attention kernel with a causal mask on one device; 0 for any other kernel.

    Counts executed FLOPs: every block that has a pair on or below the diagonal counts fully. Windows are not known here,
    so a kernel with a window is counted as one without.

    Args:
        arrays: shapes of the floating-point operands, queries and keys first: [..., T, K].
        notes: the kernel's metadata, which has its block sizes.
        fused_backward: whether one backward kernel computes all gradients.
    """
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    arrays = [sizes for sizes in arrays if len(sizes) >= 3]
    if not kind or len(arrays) < 2:
        return 0.0
    query, key = arrays[0], arrays[1]
    found = dict(re.findall(r'\\?"(\w+)\\?": (\d+|true|false)', notes))
    fused = fused_backward or found.get("use_fused_bwd_kernel") == "true"
    suffix = "" if kind[1] == "fwd" else f"_{kind[1]}"
    # Fewer queries than keys are a device's share of a row, which attends to as many keys as the row's average.
    length = key[-2]
    rows, columns = (max(1, length // (int(found.get(f"block_{side}{suffix}", 0)) or length)) for side in ("q", "kv"))
    height, width = length // rows, length // columns
    live = sum(1 for row in range(rows) for column in range(columns) if column * width < (row + 1) * height)
    factor = SPLASH["fused" if kind[1] == "dkv" and fused else kind[1]]
    return factor * math.prod(query) * length * live / (rows * columns)
