"""Work of instructions of a compiled module: FLOPs of matrix products and kernels, bytes of collectives and copies."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from lm.plan.hlo_text import Instruction, Module, array_bytes, dimensions
from lm.plan.kernels import RING, splash_flops

COLLECTIVES = frozenset(
    ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
     "collective-broadcast")
)  # fmt: skip


def collective_kind(op: str) -> str | None:
    """The kind of a collective op, such as `all-gather` for `all-gather-start`; None for other ops."""
    op = re.sub(r"-(start|done|update)$", "", op)
    return op if op in COLLECTIVES else None


def group_size(module: Module, instruction: Instruction) -> int:
    """Number of devices in one group of a collective (the text has three notations for groups)."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction.attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes)
    if listed:
        return len(listed[1].split(","))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", instruction.attributes)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        parts = [(name, re.search(r"\(\d+\)(\d+)", name)) for name in re.findall(r"'([^']+)'", axes[2])]
        return math.prod(int(part[1]) if part else sizes.get(name, 1) for name, part in parts)
    return module.num_partitions


def payload(module: Module, instruction: Instruction, computation: str, kind: str) -> float:
    """Payload of a collective on one device in bytes: the result of an all-gather, the operand of others."""
    result = instruction.bytes
    given = sum(i.bytes for i in module.operands(instruction, computation)) or result
    if instruction.op.endswith("-start"):  # its shape includes the operands
        result = given if kind in ("all-reduce", "collective-permute") else max(result - given, given)
    return result if kind == "all-gather" else given


def wire_seconds(kind: str, size: float, devices: int, link_rate: float, links: int) -> float:
    """Seconds that a collective with a payload of `size` bytes takes on a ring of `devices` over all links of a chip."""
    if kind in RING:
        return size * RING[kind](max(1, devices)) / (link_rate * links)
    return size / (2 * link_rate)


@dataclass(frozen=True)
class Fused:
    """Contents of a fused or asynchronous computation, with everything it calls: FLOPs and collectives."""

    flops: float
    collectives: tuple[tuple[Instruction, str], ...]  # (instruction, name of its computation)


class Work:
    """Work of a module's instructions, cached, since loop bodies and fusions are visited several times."""

    def __init__(self, module: Module):
        self.module = module
        self.inside = functools.cache(self._inside)
        names = [i.name for c in module.computations.values() for i in c.values() if i.target == "tpu_custom_call"]
        self.fused_backward = not any("splash" in name and "_dq" in name for name in names)

    def _inside(self, computation: str) -> Fused:
        flops, collectives = 0.0, []
        for instruction in self.module.computations.get(computation, {}).values():
            flops += self.product_flops(instruction, computation)
            if collective_kind(instruction.op):
                collectives.append((instruction, computation))
            for name in re.findall(r"calls=%?([\w.\-]+)", instruction.attributes):
                called = self.inside(name)
                flops += called.flops
                collectives += called.collectives
        return Fused(flops, tuple(collectives))

    def product_flops(self, instruction: Instruction, computation: str) -> float:
        """FLOPs of a matrix product, which the TPU compiler may write as a convolution; 0 for other instructions."""
        if instruction.op not in ("dot", "convolution"):
            return 0.0
        left, right = (dimensions(i.shape) for i in self.module.operands(instruction, computation)[:2])
        result = dimensions(instruction.shape)
        if instruction.op == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            axes = contracted[1].split(",") if contracted else []
            return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in axes if axis)
        return convolution_flops(instruction, left, right, result)

    def rows_in_place(self, fusion: Instruction) -> float:
        """Bytes of the rows that a fusion reads by a gather, or writes by a scatter in place; 0 for other instructions.

        The compiler names the operand of a scatter whose memory the result takes; it touches no other rows.
        """
        inside = self.module.computations.get(fusion.attribute("calls") or "", {})
        for one in inside.values():
            if one.op == "gather":
                return one.bytes
            if one.op == "scatter" and re.search(r'"aliasing_operands":\{"lists":\[\{', fusion.attributes):
                return inside[one.operands[-1]].bytes
        return 0.0

    def kernel_flops(self, instruction: Instruction, computation: str) -> float:
        """FLOPs of one call of an attention kernel; 0 for other kernels."""
        operands = self.module.operands(instruction, computation)
        arrays = [dimensions(i.shape) for i in operands if re.match(r"bf16|f16|f32", i.shape)]
        return splash_flops(instruction.name, arrays, instruction.attributes[:4000], self.fused_backward)


def convolution_flops(instruction: Instruction, left: list[int], right: list[int], result: list[int]) -> float:
    """FLOPs of a convolution, counting only taps on elements of the left operand, not on padding or dilation.

    The compiler turns batch dimensions of a product into spatial ones whose taps mostly fall on padding or dilation.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    of_left, of_right, of_result = labels.groups()
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=(\S+)", found[1])) if found else {}
    sizes = [int(size) for size in window.get("size", "").split("x") if size]

    def numbers(key: str, default: int) -> list[int]:
        return [int(part.split("_")[0]) for part in window[key].split("x")] if key in window else [default] * len(sizes)

    stride, pad, base, taps = (
        numbers(key, default) for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    )
    flops = 2.0 * result[of_result.index("b")] * result[of_result.index("f")] * right[of_right.index("i")]
    for axis, size in enumerate(sizes):
        length, outputs = left[of_left.index(str(axis))], result[of_result.index(str(axis))]
        flops *= _taps(length, outputs, size, stride[axis], pad[axis], base[axis], taps[axis])
    return flops


@functools.cache
def _taps(length: int, outputs: int, taps: int, stride: int, pad: int, base_dilation: int, tap_dilation: int) -> int:
    """Number of (output, tap) pairs along one axis that fall on an element of the left operand."""
    if (stride, pad, base_dilation, tap_dilation) == (1, 0, 1, 1):
        return outputs * taps
    span = (length - 1) * base_dilation + 1
    places = (output * stride + tap * tap_dilation - pad for tap in range(taps) for output in range(outputs))
    return sum(1 for place in places if 0 <= place < span and place % base_dilation == 0)


def host_bytes(module: Module, instruction: Instruction, computation: str) -> float | None:
    """Bytes that an asynchronous copy moves to or from host memory; None for a copy inside the chip.

    Memory space 5, S(5), is the host's. A `-start` has both source and result, of which the smaller one is moved.
    """
    near = [i.shape for i in module.operands(instruction, computation)]
    if not any("S(5)" in shape for shape in [*near, instruction.shape]):
        return None
    sizes = [sum(array_bytes(shape)) for shape in near] + array_bytes(instruction.shape)
    return min([size for size in sizes if size > 4096] or [0.0])


def rendezvous(module: Module, instruction: Instruction, computation: str) -> str | None:
    """Name of the transfer between slices of a `send`, `recv`, `send-done` or `recv-done`; None for other instructions."""
    if instruction.op not in ("send", "recv", "send-done", "recv-done"):
        return None
    for near in (instruction, *module.operands(instruction, computation)):
        found = re.search(r'rendezvous="([^"]*)"', near.attributes)
        if found and "megascale" in near.attributes:
            return found[1]
    return None
