"""Parser for the text of a compiled HLO module: computations, instructions, shapes."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

ITEM_BYTES = {
    "token": 0, "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2,
    "s32": 4, "u32": 4, "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f4e2m1fn": 0.5, "f8e3m4": 1, "f8e4m3": 1, "f8e4m3b11fnuz": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e8m0fnu": 1,
}  # fmt: skip

MOST_CYCLES = 2**60

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-<>]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*[^*]*\*/")
_REFERENCE = re.compile(r"%([\w.\-]+)")


def array_bytes(shape: str) -> list[float]:
    """Bytes of every array in a shape; a tuple has several."""
    return [
        ITEM_BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _ARRAY.findall(shape)
        if kind in ITEM_BYTES
    ]


def dimensions(shape: str) -> list[int]:
    """Dimensions of the first array in a shape; [] for a scalar."""
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


@dataclass(frozen=True)
class Instruction:
    """One instruction of a module's text: `name = shape op(arguments), attributes`."""

    name: str
    shape: str
    op: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def bytes(self) -> float:
        return sum(array_bytes(self.shape))

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_REFERENCE.findall(self.arguments))

    @functools.cached_property
    def cycles(self) -> int | None:
        """The TPU compiler's estimated cycles; None if it gives none, or the largest integer."""
        found = _integer(r'"estimated_cycles":"?(-?\d+)', self.attributes)
        return None if found is not None and found > MOST_CYCLES else found

    @functools.cached_property
    def target(self) -> str:
        """Target of a custom call; "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def source(self) -> str:
        """Path in the traced program, such as jit(step)/while/body/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, key: str) -> str | None:
        """The value after `key=` in the attributes; None if there is none."""
        found = re.search(rf"(?<!\w){key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def channel(self) -> int | None:
        return _integer(r"channel_id=(\d+)", self.attributes)


Computation = dict[str, Instruction]  # in the order of the schedule


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str
    num_partitions: int

    def operands(self, instruction: Instruction, computation: str) -> list[Instruction]:
        """The operands of an instruction that are in its own computation."""
        inside = self.computations[computation]
        return [inside[name] for name in instruction.operands if name in inside]


def parse(text: str) -> Module:
    """Parse a module's text, as from `Compiled.as_text()` or the compiler's dumps.

    Raises:
        ValueError: the text is not a module.
    """
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, list[str]()

    def finish() -> None:
        if pending and current is not None:
            instruction = _instruction("\n".join(pending))
            computations[current][instruction.name] = instruction
        pending.clear()

    lines = text.split("\n")
    for line in lines:
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = head[2]
                computations[current] = {}
                entry = current if head[1] else entry
        elif line.startswith("}") and not (pending and line.startswith("}}")):  # }} ends a constant of several lines
            finish()
            current = None
        elif _INSTRUCTION.match(line):
            finish()
            pending.append(line)
        elif pending:
            pending.append(line)
    if not entry:
        raise ValueError("the text of an HLO module has an ENTRY computation; this has none")
    return Module(computations, entry, _integer(r"num_partitions=(\d+)", lines[0]) or 1)


def _instruction(text: str) -> Instruction:
    head = _INSTRUCTION.match(text)
    assert head is not None
    rest = _COMMENT.sub("", text[head.end() :])
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        head[2], shape, rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :], head[1] is not None
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:120]}")


def _integer(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
