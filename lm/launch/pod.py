"""Shared parts of the launchers of TPU slices: flags, the requested slices, and the check of memory."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from lm.experiment import Experiment
from lm.launch import values
from lm.launch.job import check_experiment_path, check_mesh
from lm.launch.launcher import COUNT, JOB_NAME, Flag
from lm.launch.topology import SliceTopology, parse_topology

JOIN_TIMEOUT = 3600  # seconds; hosts of a pod start and restart at different times, and giving up ends the job for good
FLAGS = {
    **JOB_NAME,
    "--topology": Flag("NAME", "TPU slice, such as v5p:2x4x4"),
    "--slices": Flag("N", "number of slices, joined by the data-centre network (1)", range=COUNT),
    "--volume": Flag("gs://BUCKET:/PATH", "storage to mount; with gke also pvc:CLAIM:/PATH", repeated=True),
    "--zone": Flag("ZONE", "zone; with gke for the xpk command only", values.ZONE.problem),
    "--project": Flag(
        "PROJECT", "project (default: gcloud's); with gke for the xpk command only", values.PROJECT.problem
    ),
    "--spot": Flag(None, "use preemptible (spot) machines"),
    "--service-account": Flag("NAME", "service account of the hosts; with tpu-vm an e-mail address"),
    "--skip-memory-check": Flag(None, "launch even if a stage does not fit into memory by lm plan"),
}


def requested_slices(
    arguments: argparse.Namespace, experiment: Experiment, named: str, files: str
) -> tuple[SliceTopology, int]:
    """The requested slices (topology and number), checked against the experiment's mesh.

    Args:
        named: the experiment as given on the command line.
        files: the files that the machines have, for error messages.

    Raises:
        UserError: there is no such slice, the mesh does not use all its devices, or the machines would not find the
            experiment.
    """
    check_experiment_path(named, files)
    topology, slices = parse_topology(arguments.topology), arguments.slices or 1
    asked = f"--topology {arguments.topology}" + (f" --slices {slices}" if slices > 1 else "")
    with on_cpu():
        check_mesh(experiment, topology.devices * slices, slices, asked, "tpu")
    return topology, slices


def check_fits_memory(
    arguments: argparse.Namespace, experiment: Experiment, topology: SliceTopology, slices: int
) -> None:
    """Raise UserError if a stage needs more memory than a device has, unless --skip-memory-check is given."""
    if arguments.skip_memory_check:
        return
    with on_cpu():
        from lm.launch.memory import check_memory  # jax: only where there is something to launch

        for line in check_memory(experiment, topology, slices, arguments.until):
            print(f"lm launch: {line}", file=sys.stderr)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Context in which jax, if imported, uses the CPU, so that this machine's accelerators stay free for the job."""
    given = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        if given is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = given
