"""Compiles a stage's step for a TPU topology with libtpu, on a machine without TPUs, for its memory and program text."""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from lm.experiment import UserError
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import shardings
from lm.plan.chips import Topology
from lm.plan.compiler_text import CompilerFacts, read_compiled, refused_bytes
from lm.plan.libtpu import VARIABLE, Libtpu, find_libtpu
from lm.plan.program import Program
from lm.train.loop import Stepper
from lm.train_step import split_state

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # nothing runs on a TPU
    "TPU_SKIP_MDS_QUERY": "1",  # this machine is not a TPU host and has no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # allow several compilations at a time on one machine
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Environment variables to set before jax and libtpu are loaded."""


class OutOfMemory(Exception):
    """Raised if the compiler finds that a step does not fit; has the bytes that it needs and the compiler's message."""

    def __init__(self, needed: int, words: str):
        super().__init__(words)
        self.needed = needed


@dataclass(frozen=True)
class Compiled:
    """A compiled step: what its text says, and the compilation time."""

    facts: CompilerFacts
    seconds: float  # wall time of tracing, lowering and compiling
    cpu_seconds: float  # CPU time, summed over processors
    compiler: Libtpu  # estimates of different versions are not comparable


def compile_step(program: Program, libtpu: str | None = None) -> Compiled:
    """Compile the step of a stage for its topology.

    Args:
        libtpu: path of the compiler, see `find_libtpu`.

    Raises:
        UserError: there is no such compiler, or this process has loaded another one.
        OutOfMemory: the step does not fit into a device's memory.
    """
    compiler = find_libtpu(libtpu)
    devices = tpu_devices(program.topology, compiler)
    mesh = make_mesh(program.mesh, devices)
    state, batch = program.state, program.batch()
    step = Stepper(program.stage, program.optimizer, shardings(split_state(state, program.stage), mesh), mesh)
    return compile_program(lambda: step.lower(state, batch), mesh, program.topology, compiler)


def compile_program(
    lower: Callable[[], Any], mesh: Mesh, topology: Topology, compiler: Libtpu, unknown: int = 1
) -> Compiled:
    """Compile a program for the devices of a mesh.

    Args:
        lower: traces and lowers it.
        unknown: iterations of a loop whose number the program does not tell.

    Raises:
        OutOfMemory: the program does not fit into a device's memory.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as dump, quiet(), without_cpu_flags(), jax.set_mesh(mesh):
        lowered = lower()
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if needed := refused_bytes(str(error)):
                raise OutOfMemory(needed, str(error).splitlines()[0]) from None
            raise
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        facts = read_compiled(compiled, Path(dump), compiler.version, topology.chip, topology.slices, unknown)
    return Compiled(facts, seconds, cpu_seconds, compiler)


_loaded: Path | None = None  # the libtpu that this process has loaded, which cannot be replaced


def tpu_devices(topology: Topology, compiler: Libtpu) -> list[Any]:
    """Descriptions of the devices of a topology.

    Raises:
        UserError: this process has loaded another compiler.
    """
    global _loaded
    if _loaded not in (None, compiler.path):
        raise UserError(f"this process has loaded {_loaded}; start a new process to use {compiler.path}")
    _loaded = compiler.path
    os.environ[VARIABLE] = str(compiler.path)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with quiet(), without_cpu_flags():
        described = topologies.get_topology_desc(
            topology_name=topology.name, platform="tpu", num_slices=topology.slices
        )
    return list(described.devices)


def save_text(text: str, path: Path) -> None:
    """Write a compiled module's text, compressed if the name ends in .gz.

    Raises:
        UserError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"--hlo {path}: there is no folder {path.parent}")
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context that discards what libtpu writes directly to standard error."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def without_cpu_flags() -> Iterator[None]:
    """Context that removes CPU flags from XLA_FLAGS, since libtpu silently ends the process at an unknown flag."""
    given = os.environ.get("XLA_FLAGS")
    if given is None:
        yield
        return
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in given.split() if not flag.startswith("--xla_cpu_"))
    try:
        yield
    finally:
        os.environ["XLA_FLAGS"] = given
