"""Consistency checks between the processes of a run before training: experiment, data, run folder."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import time
from typing import Any

import jax

import lm
from lm.experiment import Experiment, UserError, diff, to_dict
from lm.parallel.distributed import broadcast_from_main, gather, is_main_process, run_on_main
from lm.train.run_folder import RunFolder

SHARED_SECONDS = 10.0  # how long a network file system may take to show a new file to the other hosts
MOST_DIFFERENCES = 3


def check_same(experiment: Experiment, options: dict[str, Any]) -> None:
    """Check that all processes have the same experiment, command options and lm version.

    Raises:
        UserError: in all processes; shows two differing hashes and the first differing values.
    """
    if jax.process_count() == 1:
        return
    asked = {"experiment": to_dict(experiment), **options, "lm": lm.__version__}
    hashes = gather(hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16])
    other = _odd_one(hashes)
    if other is None:
        return
    values = gather(asked if jax.process_index() in (0, other) else None)
    differences = [
        f"{name.removeprefix('experiment.')}: {json.dumps(ours)} and {json.dumps(theirs)}"
        for name, ours, theirs in diff(values[0], values[other])
    ]
    more = len(differences) - MOST_DIFFERENCES
    shown = "; ".join(differences[:MOST_DIFFERENCES]) + (f"; … and {more} more" if more > 0 else "")
    raise UserError(
        f"processes disagree about the experiment: process 0 has {hashes[0]}, process {other} has {hashes[other]} "
        f"({shown}): start all of them with the same command and the same files"
    )


def check_same_data(fingerprints: dict[str, str]) -> None:
    """Check that all processes read the same data, by stage.

    Raises:
        UserError: in all processes; names the stage and shows the two fingerprints.
    """
    found = gather(fingerprints)
    other = _odd_one(found)
    if other is not None:
        name = next(name for name in found[0] if found[0][name] != found[other][name])
        raise UserError(
            f"the data of stage {name} differs between processes: process 0 reads {found[0][name][:16]}, process {other} "
            f"{found[other][name][:16]}: give every host the same files"
        )


def check_shared(folder: RunFolder, patience: float = SHARED_SECONDS) -> None:
    """Check that all processes see what process 0 writes in the run folder.

    Raises:
        UserError: in all processes; names a process that does not see it, and its host.
    """
    if jax.process_count() == 1:
        return
    nonce = broadcast_from_main(lambda: secrets.token_hex(8))
    file = folder.path / f".shared-{nonce}"
    run_on_main(lambda: file.write_text(nonce))
    until = time.monotonic() + patience
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.2)
    blind = [host for host in gather(None if file.exists() else [jax.process_index(), socket.gethostname()]) if host]
    if is_main_process():
        file.unlink()
    if blind:
        process, host = blind[0]
        raise UserError(
            f"{folder.path} is not shared between the hosts: process {process} on {host} does not see what process 0 "
            "writes there; name a folder on a file system that all of them have mounted (--run-dir DIR)"
        )


def _odd_one(values: list[Any]) -> int | None:
    """The first process whose value differs from process 0's."""
    return next((process for process, value in enumerate(values) if value != values[0]), None)
