"""FLOPs of attention kernels, which neither compiler nor trace reports, and assumed rates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

HOST_RATE = 16e9  # bytes/s between a device and its host's memory
# FLOPs of a splash-attention kernel per query, key and head dimension. A fused backward kernel computes the gradients of
# q, k and v; the module then has no kernel for dq.
SPLASH = {"fwd": 4, "dq": 6, "dkv": 8, "fused": 10}

# Bytes sent by one device / bytes of the payload, on a ring of n devices. A permutation uses one link in both directions.
RING = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n / 2,
    "ragged-all-to-all": lambda n: (n - 1) / n / 2,
}

KERNEL_EFFICIENCY = 0.5  # assumed fraction of the peak that attention kernels reach (0.4 to 0.7 is usual)


def splash_flops(name: str, arrays: Sequence[Sequence[int]], notes: str, fused_backward: bool) -> float:
    """FLOPs of one call of a splash-attention kernel with a causal mask on one device; 0 for any other kernel.

    Counts executed FLOPs: every block that has a pair shown by the mask and the window counts fully.

    Args:
        arrays: shapes of the floating-point operands, queries and keys first: [..., T, K].
        notes: the kernel's metadata, which has its block sizes and its window (jax's own kernel has no window there, and
            is counted as one without).
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
    window = int(found.get("window", 0)) or length
    live = sum(
        column * width < (row + 1) * height and (column + 1) * width > row * height - window + 1
        for row in range(rows)
        for column in range(columns)
    )
    factor = SPLASH["fused" if kind[1] == "dkv" and fused else kind[1]]
    return factor * math.prod(query) * length * live / (rows * columns)
