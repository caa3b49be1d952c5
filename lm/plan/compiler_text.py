"""Read memory, FLOPs, collectives and time of a compiled TPU program from the compiler's text.

The compiler has no stable interface for the memory allocated to a program or for the time of its instructions: both are
in texts whose format may change with any version. This is the only module that reads them. For a version that is not in
`TESTED` it warns in one line, and a text without the expected fields is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lm.experiment import UserError
from lm.plan.chips import Chip
from lm.plan.hlo_cost import CompiledCost, estimate
from lm.plan.hlo_text import parse

TESTED = {"libtpu": ("0.0.42.1", "0.0.52"), "jaxlib": ("0.10.2",)}
"""The versions whose modules, lists of allocations and error messages are known to be read correctly."""


@dataclass(frozen=True)
class CompilerFacts:
    """Facts of a compiled program on one device: peak memory; FLOPs, collectives and seconds; its text.

    notes: warnings, one line each, about how reliable the facts are.
    """

    peak_bytes: int
    cost: CompiledCost
    text: str
    notes: tuple[str, ...]


def read_compiled(
    compiled: Any, dump: Path, libtpu: str | None, chip: Chip, slices: int, unknown: int = 1
) -> CompilerFacts:
    """Read the facts of an executable.

    Args:
        compiled: the result of `jax.stages.Lowered.compile`.
        dump: the folder given to the compiler options xla_dump_to and xla_dump_hlo_as_text.
        libtpu: version of the compiler; None if unknown.
        unknown: iterations of a loop whose number the program does not tell.

    Raises:
        UserError: the text of an untested version cannot be read.
    """
    text, notes = _text(compiled, dump), untested(libtpu)
    allocated = _allocated_bytes(dump)
    if allocated is None:
        notes += (
            "the compiler listed no allocations: memory is that of memory_analysis(), which may be 40 % too large",
        )
    return CompilerFacts(
        allocated or _analysed_bytes(compiled), read_module(text, libtpu, chip, slices, unknown), text, notes
    )


def read_module(text: str, libtpu: str | None, chip: Chip, slices: int = 1, unknown: int = 1) -> CompiledCost:
    """Read FLOPs, collectives and estimated seconds of a program from its text alone.

    Raises:
        UserError: the text of an untested version cannot be read.
    """
    try:
        if "estimated_cycles" not in text:
            raise ValueError("no instruction has estimated_cycles")
        return estimate(parse(text), chip, slices, unknown)
    except (ValueError, LookupError, AttributeError, AssertionError) as error:
        if not (notes := untested(libtpu)):
            raise
        raise UserError(f"{notes[0]}: {error}; without --compile lm plan asks no compiler") from error


def refused_bytes(words: str) -> int | None:
    """Bytes needed, from the compiler's error for a too large program, `… (480.00G) exceeds available HBM (15.75G)`; None for others."""
    found = re.search(r"\(?([\d.]+)([KMGT])\)? exceeds available HBM", words)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def untested(libtpu: str | None) -> tuple[str, ...]:
    """A warning that names versions of libtpu and jaxlib whose text has not been tested; () if both have been."""
    here = {"libtpu": libtpu or "of unknown version", "jaxlib": version("jaxlib")}
    new = [f"{name} {found}" for name, found in here.items() if found not in TESTED[name]]
    known = ", ".join(f"{name} {' or '.join(found)}" for name, found in TESTED.items())
    return (
        (f"the text of {' and '.join(new)} was read as that of {known}, the versions that lm is tested with",)
        if new
        else ()
    )


def _allocated_bytes(dump: Path) -> int | None:
    """HBM in bytes allocated to a program, from the compiler's dumped list of allocations; None if there is none.

    The list is preferred to `memory_analysis`, whose `temp_size_in_bytes` is 20 to 40 % larger in libtpu 0.0.42 (12.3 GB
    instead of 9.8 for the 0.6B step of experiments/pods). The list agrees with the peak of live buffers and with the size
    at which the compiler refuses a program (a step of 18.1 GB by `memory_analysis` compiles for 16.9 GB of memory). In
    libtpu 0.0.52 both are equal.
    """
    totals = [_allocated(path.read_text()) for path in dump.glob("*buffer-assignment.txt")]
    return max(filter(None, totals), default=None)


def _allocated(text: str) -> int:
    """Sum of the allocations in HBM; those in other memories have a color."""
    found = re.findall(r"^allocation \d+: size (\d+)(.*)$", text, re.MULTILINE)
    return sum(int(size) for size, rest in found if not re.match(r", color [1-9]", rest))


def _analysed_bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    # The state is donated, so the step's results alias its arguments, except the metrics.
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + own


def _text(compiled: Any, dump: Path) -> str:
    """Text of the scheduled module; from the compiler's dump if `as_text` fails, as for programs that use SparseCore."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        texts = sorted(dump.glob("*.txt"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in texts:
            text = path.read_text()
            if "estimated_cycles" in text and "ENTRY" in text:
                return text
        raise
