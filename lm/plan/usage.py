"""What a block of operations needs on one device: the most memory that lives at once, FLOPs, bytes moved, seconds.

A model of what a compiler makes of it. Products, kernels, gathers, reductions and loops write their results to memory;
everything else is elementwise or moves data, is fused into whoever reads it, and holds what it was made from alive instead.
What a loop gives back is kept for all its turns: that is where the activations saved for the backward pass are seen,
whatever the rematerialisation policy. A value with the sizes of a parameter is made whole and kept in parts, as the
parameter is; a parameter that lies in parts is gathered where it is read.

Rows are traced whole. Where a mesh splits their tokens, everything but the parameters is that much smaller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lm.plan.chips import Chip
from lm.plan.kernels import KERNEL_EFFICIENCY, splash_flops
from lm.plan.trace import Block, Op, Value

WRITTEN = frozenset(
    ("dot_general", "conv_general_dilated", "pallas_call", "gather", "scatter", "scatter-add", "scatter_add", "sort",
     "top_k", "cumsum", "argmax", "argmin", "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
     "reduce_prod", "scan", "while", "cond", "random_bits", "threefry2x32", "custom_call")
)  # fmt: skip
PRODUCT_EFFICIENCY = 0.92  # part of the peak that large matrix products reach


@dataclass
class Usage:
    """Of one device; bytes, FLOPs and seconds."""

    # What lives when most does, by kind: gradients, activations (saved by loops), logits, working. What came in is not in it.
    peak: Counter[str] = field(default_factory=Counter)
    product_flops: float = 0.0
    kernel_flops: float = 0.0
    moved: float = 0.0  # bytes read from and written to HBM
    compute_s: float = 0.0  # products and kernels
    seconds: float = 0.0  # each operation at the slower of its two rates, one after another
    kernels: set[str] = field(default_factory=set)  # those whose FLOPs are not known
    turns: list[Usage] = field(default_factory=list)  # one turn of each loop, in their order

    def add(self, other: Usage, times: int) -> None:
        """Count what happens in `times` turns of a loop; the peak is the caller's."""
        for name in ("product_flops", "kernel_flops", "moved", "compute_s", "seconds"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.kernels |= other.kernels

    def raise_peak(self, kinds: Counter[str]) -> None:
        if kinds.total() > self.peak.total():
            self.peak = kinds


@dataclass(frozen=True)
class Analysis:
    """Usage of blocks on a chip.

    Args:
        parts: in how many parts parameters lie, see one_device.parts.
        vocab_size: by which logits are recognised.
        ways: into how many parts the tokens of a row are split.
    """

    chip: Chip
    parts: dict[tuple[int, ...], int]
    vocab_size: int
    ways: int = 1

    def usage(self, block: Block, parameters: set[Value]) -> Usage:
        """Of one run of a block, whose inputs `parameters` are parameters or cut from them."""
        return _Run(self, block, set(parameters)).usage()

    def in_parts(self, block: Block) -> Usage:
        """Of a block that works on parameters as they lie, such as an optimizer's update: gradients come first."""
        run = _Run(self, block, set(), split=True)
        result = run.usage()
        ends = sum(self.share(value, value.bytes) for value in (*block.inputs, *block.outputs))
        result.moved += ends
        result.seconds += ends / self.chip.hbm_rate
        return result

    def count(self, value: Value) -> int:
        """In how many parts a parameter, or what has its sizes, lies between uses."""
        return self.parts.get(tuple(sorted(value.shape)), 1)

    def is_parameter(self, value: Value) -> bool:
        """Whether it has the sizes of a parameter."""
        return tuple(sorted(value.shape)) in self.parts

    def share(self, value: Value, size: float, whole: bool = False) -> float:
        """What one device has of a value of this size; `whole`: while it is worked on."""
        if self.is_parameter(value):
            return size if whole else size / self.count(value)
        return size / self.ways

    @property
    def kernel_share(self) -> float:
        """Of the attention of a row, what the device with its last tokens does: it sees the most."""
        return (2 * self.ways - 1) / self.ways**2


class _Run:
    """One pass over a block, in its order. With `split` even what is worked on lies in parts."""

    def __init__(self, analysis: Analysis, block: Block, parameters: set[Value], split: bool = False):
        self.of, self.block, self.parameters, self.split = analysis, block, parameters, split
        self.own = set(block.inputs)  # live outside, for the whole block
        # Value -> what must be in memory for it: itself if it is written there, else what it is made from.
        self.roots: dict[Value, frozenset[Value]] = {value: frozenset((value,)) for value in block.inputs}
        self.readers: dict[Value, list[Op]] = {}
        for op in block.ops:
            for value in op.inputs:
                self.readers.setdefault(value, []).append(op)
        self.result = Usage()

    def usage(self) -> Usage:
        last = self._last_uses()
        live: dict[Value, tuple[str, int]] = {}
        for place, op in enumerate(self.block.ops):
            if op.name not in WRITTEN:
                continue
            inner = self._inside(op)
            gathered = self._gathered(op)
            ending = {root for value in op.inputs for root in self._held(value) if last.get(root) == place}
            now = Counter(inner.peak if inner else ())
            for kind, size in live.values():
                now[kind] += size
            for value in op.outputs:
                now[self._kind(op, value)] += self._bytes(value, whole=op.body is None)
            now["working"] += gathered - self._reused(op, live, ending)
            self.result.raise_peak(now)
            self._count(op, inner, gathered)
            for root in ending:
                live.pop(root, None)
            made = (value for value in op.outputs if last.get(value, -1) > place)
            live |= {value: (self._kind(op, value), self._bytes(value, whole=False)) for value in made}
        return self.result

    def _last_uses(self) -> dict[Value, int]:
        """Where each value that is in memory is needed last; and from what every other value is made."""
        last: dict[Value, int] = {}
        for place, op in enumerate(self.block.ops):
            if op.inputs and op.body is None and all(map(self._from_parameters, op.inputs)):
                self.parameters |= set(op.outputs)
            held = frozenset(root for value in op.inputs for root in self.roots.get(value, ()))
            if op.name in WRITTEN:
                last |= dict.fromkeys(held - self.own, place)
                self.roots |= {value: frozenset((value,)) for value in op.outputs}
            else:
                self.roots |= dict.fromkeys(op.outputs, held)
        for value in self.block.outputs:
            last |= dict.fromkeys(self._held(value), len(self.block.ops))
        return last

    def _held(self, value: Value) -> frozenset[Value]:
        """What lives for it in this block; nothing for constants and what came in."""
        return self.roots.get(value, frozenset()) - self.own

    def _from_parameters(self, value: Value) -> bool:
        return value in self.parameters or value not in self.roots  # a constant may join in

    def _kind(self, op: Op, value: Value) -> str:
        if self.of.is_parameter(value):
            return "gradients"
        if self.of.vocab_size in value.shape:
            return "logits"
        return "activations" if op.body is not None and value in op.outputs[op.carry :] else "working"

    def _bytes(self, value: Value, whole: bool) -> int:
        """Bytes that a result takes: narrowed where all that is read of it is a narrower copy."""
        readers, itemsize = self.readers.get(value, []), value.itemsize
        if readers and value not in self.block.outputs and all(op.name == "convert_element_type" for op in readers):
            itemsize = min(itemsize, max(op.outputs[0].itemsize for op in readers))
        return int(self.of.share(value, value.size * itemsize, whole and not self.split))

    def _reused(self, op: Op, live: dict[Value, tuple[str, int]], ending: set[Value]) -> int:
        """Bytes of a loop's results that take the place of what the loop started from."""
        if op.body is None:
            return 0
        starts = op.inputs[op.constants : op.constants + op.carry]
        return sum(live[start][1] for start in starts if start in ending and start in live)

    def _gathered(self, op: Op) -> int:
        """Bytes of parameters in parts that are whole while this operation reads them."""
        if op.body is not None or self.split:
            return 0
        read = dict.fromkeys(value for value in op.inputs if value in self.parameters)
        return sum(value.bytes for value in read if self.of.count(value) > 1)

    def _inside(self, op: Op) -> Usage | None:
        """Usage of one turn of a loop."""
        if op.body is None:
            return None
        pairs = zip(op.body.inputs, op.inputs, strict=True)
        return self.of.usage(op.body, {inside for inside, outside in pairs if outside in self.parameters})

    def _count(self, op: Op, inner: Usage | None, gathered: int) -> None:
        if inner is not None:
            self.result.add(inner, op.turns)
            self.result.turns.append(inner)
            return
        flops, kernel = product_flops(op), kernel_flops(op) * self.of.kernel_share
        flops /= max(map(self.of.count, op.outputs)) if self.split else self.of.ways
        if op.name == "pallas_call" and not kernel:
            self.result.kernels.add(str(op.params.get("name")))
        # What is gathered is written once and read once.
        moved = sum(self._read(op)) + sum(self._bytes(value, whole=True) for value in op.outputs) + 2 * gathered
        peak = self.of.chip.peak
        busy = flops / (peak * PRODUCT_EFFICIENCY) + kernel / (peak * KERNEL_EFFICIENCY)
        self.result.product_flops += flops
        self.result.kernel_flops += kernel
        self.result.moved += moved
        self.result.compute_s += busy
        self.result.seconds += max(busy, moved / self.of.chip.hbm_rate)

    def _read(self, op: Op) -> Iterator[float]:
        """Bytes of each array that an operation reads; of a table, or of a stack of layers, only what it takes."""
        if op.name == "gather":
            yield from (min(value.bytes, op.outputs[0].bytes) / self.of.ways for value in op.inputs)
            return
        here = (value for value in op.inputs if self.split or value not in self.parameters or self.of.count(value) == 1)
        read = {root: value for value in here for root in self.roots.get(value, ())}
        for root, value in read.items():
            size = min(root.bytes, value.size * root.itemsize) if root in self.own else root.bytes
            yield self.of.share(root, size, whole=not self.split)


def product_flops(op: Op) -> float:
    """FLOPs of a matrix product; 0 of anything else."""
    if op.name != "dot_general":
        return 0.0
    (contracted, _), _ = op.params["dimension_numbers"]
    return 2.0 * op.outputs[0].size * math.prod(op.inputs[0].shape[axis] for axis in contracted)


def kernel_flops(op: Op) -> float:
    """FLOPs of a kernel that lm/plan/kernels.py knows; 0 of anything else."""
    if op.name != "pallas_call":
        return 0.0
    arrays = [value.shape for value in op.inputs if value.is_float]
    # No kernel for dq is ever called where the backward kernel is fused, which is how this model calls it.
    return splash_flops(str(op.params["name"]), arrays, str(op.params.get("metadata")), fused_backward=True)
