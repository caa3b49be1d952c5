"""What launchers of TPU slices share: their flags, the slices that are asked for, and whether stages fit into their memory."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from lm.experiment import Experiment
from lm.launch import values
from lm.launch.job import check_mesh, check_travels
from lm.launch.launcher import COUNT, JOB_NAME, Flag
from lm.launch.topology import SliceTopology, parse_topology

JOIN_TIMEOUT = (
    3600  # machines of a pod come, and come back, at different times; to give up is an error that no restart mends
)
FLAGS = {
    **JOB_NAME,
    "--topology": Flag("NAME", "slice of TPUs, such as v5p:2x4x4"),
    "--slices": Flag("N", "slices, joined by the data-centre network (1)", range=COUNT),
    "--volume": Flag("gs://BUCKET:/PATH", "storage to mount; of gke also pvc:CLAIM:/PATH", repeated=True),
    "--zone": Flag("ZONE", "of tpu-vm; of gke for the xpk command only", values.ZONE.problem),
    "--project": Flag("PROJECT", "else gcloud's own; of gke for the xpk command only", values.PROJECT.problem),
    "--spot": Flag(None, "preemptible (spot) machines"),
    "--service-account": Flag("NAME", "what the hosts are allowed to do; of tpu-vm an e-mail address"),
    "--skip-memory-check": Flag(None, "launch although a stage does not fit into memory (lm plan)"),
}


def slices_of_tpus(
    arguments: argparse.Namespace, experiment: Experiment, named: str, files: str
) -> tuple[SliceTopology, int]:
    """The slices asked for, all of whose devices the experiment uses.

    Args:
        named: the experiment as the command line calls it.
        files: which the machines have, in words.

    Raises:
        UserError: there is no such slice, the mesh is not one of it, or the machines would not find the experiment.
    """
    check_travels(named, files)
    topology, slices = parse_topology(arguments.topology), arguments.slices or 1
    asked = f"--topology {arguments.topology}" + (f" --slices {slices}" if slices > 1 else "")
    with on_cpu():
        check_mesh(experiment, topology.devices * slices, slices, asked, "tpu")
    return topology, slices


def check_fits_memory(
    arguments: argparse.Namespace, experiment: Experiment, topology: SliceTopology, slices: int
) -> None:
    """Raises UserError at a stage that needs more memory than a device has, unless that is not to be looked at."""
    if arguments.skip_memory_check:
        return
    with on_cpu():
        from lm.launch.memory import check_memory  # jax: only where there is something to launch

        for line in check_memory(experiment, topology, slices, arguments.until):
            print(f"lm launch: {line}", file=sys.stderr)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Keep jax, if it is imported here, off the accelerators of this machine; what is started later may have them."""
    given = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        if given is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = given
