"""Multi-process runs: joining processes, exchanging values, and distributing rows of arrays; trivial with one process."""

from __future__ import annotations

import atexit
import contextlib
import glob
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from lm.experiment import UserError

T = TypeVar("T")
Tree = Any

JOIN_TIMEOUT = 300  # seconds until the coordinator must answer and every process must have joined
LEAVE_TIMEOUT = 10  # seconds that an ending process waits for the others to end
LIBRARY_TIMEOUT = (
    24 * 3600
)  # never reached: at its own timeout the library aborts the process with pages of stack traces
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FLAGS = ("--coordinator", "--num-processes", "--process-id")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run: coordinator's address, number of processes, number of this one; None: as the cluster says."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = JOIN_TIMEOUT


def find_process_group(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float = JOIN_TIMEOUT
) -> ProcessGroup | None:
    """Find the process group from the flags, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    else from the cluster (Slurm, Open MPI, GKE, TPU VMs). None: a single process.

    Raises:
        UserError: a part is missing or invalid.
    """
    address = coordinator or os.environ.get(VARIABLES[0])
    count = _integer(VARIABLES[1]) if num_processes is None else num_processes
    number = _integer(VARIABLES[2]) if process_id is None else process_id
    given = (address, count, number)
    if count == 1 and not number:
        return None
    missing = [f"{f} ({v})" for f, v, value in zip(FLAGS, VARIABLES, given, strict=True) if value is None]
    if missing and not in_cluster():
        if len(missing) == len(given):
            return None
        raise UserError(f"{' and '.join(missing)} missing: a run of several processes needs all three")
    if address is not None and not (address.rpartition(":")[0] and address.rpartition(":")[2].isdecimal()):
        raise UserError(
            f"--coordinator is {address!r}; it should be HOST:PORT of process 0, for instance 10.0.0.2:8476"
        )
    if count is not None and count < 1:
        raise UserError(f"--num-processes is {count}; it should be at least 1")
    if number is not None and count is not None and not 0 <= number < count:
        raise UserError(f"--process-id is {number}; with --num-processes {count} it should be from 0 to {count - 1}")
    return ProcessGroup(address, count, number, timeout)


def in_cluster() -> bool:
    """Whether a cluster that jax can query has started this process as one of several."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any((_integer(name) or 1) > 1 for name in tasks):
        return True
    if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:
        return "," in hosts or (_integer("MEGASCALE_NUM_SLICES") or 1) > 1
    # A TPU VM outside GKE is detected by its metadata server, which jax queries.
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and "TPU_SKIP_MDS_QUERY" not in os.environ


@contextlib.contextmanager
def joined(job: ProcessGroup | None) -> Iterator[None]:
    """Context in which the processes are joined: `jax.devices()` has the devices of all. Does nothing for None.

    Enter it before jax initialises devices. An ending process waits for the others to end too; one that fails
    alone waits LEAVE_TIMEOUT seconds and exits, whereupon the others notice and end.

    Raises:
        UserError: the coordinator did not answer or processes did not join within `job.timeout` seconds.
    """
    if job is None or jax.distributed.is_initialized():
        yield
        return
    ending = _Ending()
    atexit.register(ending.leave)  # before jax's own, which waits for minutes and aborts
    try:
        _join(job)
        ending.joined = True
        yield
        ending.code, ending.patience = 0, JOIN_TIMEOUT
    except UserError:
        ending.code = 2
        raise


def _join(job: ProcessGroup) -> None:
    failed: list[Exception] = []

    def initialize() -> None:
        known = None not in (job.coordinator, job.num_processes, job.process_id)
        try:
            jax.distributed.initialize(
                job.coordinator,
                job.num_processes,
                job.process_id,
                cluster_detection_method="deactivate" if known else None,
                initialization_timeout=LIBRARY_TIMEOUT,
                shutdown_timeout_seconds=LIBRARY_TIMEOUT,
            )
        except Exception as error:
            failed.append(error)

    # In a thread, since the library never returns from a failed wait.
    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(job.timeout)
    where = job.coordinator or "the coordinator that the cluster names"
    if failed and isinstance(failed[0], ValueError) and job == ProcessGroup(timeout=job.timeout):
        return  # looks like a cluster but is none: a single process
    if failed:
        raise UserError(f"{where} cannot be joined: {failed[0]}") from failed[0]
    if thread.is_alive() and job.process_id == 0:
        raise UserError(
            f"{where}: some of {job.num_processes} processes did not join within {job.timeout:g} seconds "
            "(--join-timeout); is this address process 0's, and can the others reach it?"
        )
    if thread.is_alive():
        raise UserError(
            f"{where} cannot be reached: no answer within {job.timeout:g} seconds (--join-timeout); "
            "is process 0 running, and is this its address?"
        )


@dataclass
class _Ending:
    """Exit of this process: together with the others if they end too, else alone with its own exit code."""

    joined: bool = False
    code: int = 1
    patience: float = LEAVE_TIMEOUT

    def leave(self) -> None:
        if self.joined and jax.distributed.is_initialized():
            thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
            thread.start()
            thread.join(self.patience)
            if not thread.is_alive():
                return
        elif self.joined:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


# ---- exchange ---------------------------------------------------------------------------------------------------


def is_main_process() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Gather a JSON value from every process, in process order. A barrier: all processes must call it."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(raw.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: raw.size] = raw
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def raise_on_all(act: Callable[[], T]) -> T:
    """Run `act` in every process; a UserError in any of them is raised in all, so that none waits for the others."""
    result, failure = None, None
    try:
        result = act()
    except UserError as error:
        failure = error
    if failure is not None and jax.process_count() == 1:
        raise failure
    said = gather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for process, text in enumerate(said):
        if text is not None:
            raise UserError(*f"process {process}: {text}".split("\n"))
    return result  # type: ignore[return-value]


def run_on_main(act: Callable[[], T]) -> T | None:
    """Run `act` in the main process only, while the others wait and get None; a UserError is raised in all."""
    return raise_on_all(lambda: act() if is_main_process() else None)


def broadcast_from_main(find: Callable[[], T]) -> T:
    """Run `find` in the main process and return its JSON value in every process; a UserError is raised in all."""
    if jax.process_count() == 1:
        return find()
    return gather(run_on_main(find))[0]


# ---- arrays ------------------------------------------------------------------------------------------------------


def own_rows(sharding: NamedSharding, count: int) -> np.ndarray | None:
    """Indices of the rows (of `count`) on this process's devices under a sharding, ascending; None: all rows."""
    if jax.process_count() == 1:
        return None
    parts = [index[0].indices(count) for index in sharding.addressable_devices_indices_map((count,)).values() if index]
    return np.unique(np.concatenate([np.arange(*part) for part in parts]))


def to_devices(tree: Tree, sharding: NamedSharding, rows: Sequence[int] | np.ndarray | None, count: int) -> Tree:
    """Put host arrays on the devices as global arrays of `count` rows.

    Args:
        rows: indices of the rows that the host arrays have (ascending; None: all), including this process's rows.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    held = np.arange(count) if rows is None else np.asarray(rows)

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # only of what is no array
            start, stop, _ = index[0].indices(count)
            return x[np.searchsorted(held, start) : np.searchsorted(held, stop)][(slice(None), *index[1:])]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

    return jax.tree.map(one, tree)


def fetch(tree: Tree) -> Tree:
    """Fetch global arrays as full host arrays in every process; all must call it."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def _integer(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"the environment variable {variable} is {text!r}; it should be an integer")
    return int(text)
