"""Launcher `tpu-vm`: a script that requests a slice, waits for it, copies the code, and starts the run on every host.

The code is copied as a git bundle of the current commit: hosts need no access to the remote repository, and the run's
provenance has the commit. On the hosts the processes find each other by their slice's metadata, and a supervisor
(`lm launch --on local`) restarts each. Source: `gcloud compute tpus queued-resources create --help`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from dataclasses import dataclass

from lm.experiment import Experiment, UserError
from lm.launch import pod, values
from lm.launch.job import Handover, Job
from lm.launch.launcher import Flag, Launch, Launcher, handover_launch
from lm.launch.topology import SliceTopology
from lm.launch.volumes import Volume, check_run_dir, parse_volumes

TEMPLATE = """\
#!/bin/bash
# For `bash`, in the folder of the repository, with gcloud logged in: {accelerators}.
set -euo pipefail

place=({place})
nodes=({nodes})
gcloud compute tpus queued-resources create {name} "${{place[@]}}" \\
    {request}

state=
while [[ "$state" != ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe {name} "${{place[@]}}" --format='value(state.state)')
    echo "lm launch: {name} is $state"
    case $state in
        ACTIVE) ;;
        FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
        *) sleep 30 ;;
    esac
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git bundle create --quiet "$folder/lm.bundle" HEAD
cat >"$folder/lm-host.sh" <<'HOST'
set -euo pipefail
{host}
HOST

for node in "${{nodes[@]}}"; do
    gcloud compute tpus tpu-vm scp --quiet "${{place[@]}}" --worker=all "$folder"/lm.bundle "$folder"/lm-host.sh "$node":
    gcloud compute tpus tpu-vm ssh --quiet "${{place[@]}}" --worker=all "$node" --command='bash lm-host.sh'
done
for node in "${{nodes[@]}}"; do  # when all are ready, since the first waits for the last
    gcloud compute tpus tpu-vm ssh --quiet "${{place[@]}}" --worker=all "$node" \\
        --command={start}
done
"""

HOST = """\
if ! command -v python3.11 >/dev/null; then  # the hosts' own Python is older
    sudo apt-get update -qq
    sudo apt-get install -y -qq python3.11 python3.11-venv
fi
{mounts}
if [[ ! -d {folder} ]]; then git clone --quiet --no-checkout lm.bundle {folder}; fi
cd {folder}
git checkout --quiet {commit}
source scripts/environment.sh
prepare tpu"""

MOUNT = """\
if ! mountpoint -q {path}; then
    if ! command -v gcsfuse >/dev/null; then echo "gcsfuse is not on $HOSTNAME: it mounts {bucket}" >&2; exit 1; fi
    sudo mkdir -p {path}
    sudo chown "$USER" {path}
    gcsfuse --implicit-dirs {bucket} {path}
fi"""


@dataclass(frozen=True)
class Slices:
    """Requested slices and options of a job on TPU VMs, and the commit that runs there."""

    topology: SliceTopology
    slices: int
    zone: str
    volumes: tuple[Volume, ...]
    commit: str
    project: str | None = None
    runtime: str | None = None  # software version; None: the generation's default
    service_account: str | None = None
    spot: bool = False
    reserved: bool = False


def render(job: Job, slices: Slices) -> Handover:
    """Render the script for `bash -s`.

    Raises:
        UserError: the TPU generation is on GKE only, TPU VMs cannot mount a volume, or the run folder is on a host's disk.
    """
    generation = slices.topology.generation
    if generation.runtime is None:
        raise UserError(f"{slices.topology.kind} is available on GKE only: --on gke")
    if any(volume.claim for volume in slices.volumes):
        raise UserError("--volume pvc:… is for Kubernetes only; TPU VMs mount gs://BUCKET:/PATH")
    if slices.spot and slices.reserved:
        raise UserError("--spot and --reserved exclude each other: a reservation is not preemptible; give one of them")
    check_run_dir(job.run_dir, slices.volumes, "is on the disk of each host, and lost with it")
    where = _options(zone=slices.zone, project=slices.project)
    many = slices.slices > 1
    request = _options(
        accelerator_type=slices.topology.accelerator_type,
        runtime_version=slices.runtime or generation.runtime,
        node_id=None if many else job.name,
        node_count=slices.slices if many else None,
        node_prefix=job.name if many else None,
        service_account=slices.service_account,
        spot=slices.spot,
        reserved=slices.reserved,
    )
    nodes = [f"{job.name}-{i}" for i in range(slices.slices)] if many else [job.name]
    text = TEMPLATE.format(
        accelerators=f"{slices.slices} x {slices.topology.accelerator_type}, {slices.topology.shape}",
        request=request,
        place=where,
        name=job.name,
        nodes=" ".join(nodes),
        host=_host(slices),
        start=shlex.quote(_start(job, slices)),
    )
    ssh = f"gcloud compute tpus tpu-vm ssh {nodes[0]} {where}"
    return Handover(
        text=text,
        command=("bash", "-s"),
        tools=("bash", "git", "gcloud"),
        next=(
            f"watch: {ssh} --command='tail -f {job.name}.log'",
            f"stop: {ssh} --worker=all --command='pkill -TERM -f \"lm launch\"'",
            f"give the TPUs back: gcloud compute tpus queued-resources delete {job.name} {where} --force",
        ),
    )


def current_commit() -> str:
    """The commit checked out here, which the hosts will run.

    Raises:
        UserError: this is not a git repository, or it has uncommitted changes.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("tpu-vm copies the commit checked out here, but this folder is in no git repository") from error
    if changed:
        raise UserError(f"TPU VMs run the last commit, but {len(changed)} files differ from it: commit them first")
    return commit


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()


def _host(slices: Slices) -> str:
    mounts = [MOUNT.format(path=shlex.quote(volume.path), bucket=volume.bucket) for volume in slices.volumes]
    return HOST.format(mounts="\n".join(mounts), folder=_folder(slices), commit=slices.commit)


def _start(job: Job, slices: Slices) -> str:
    """The command that starts the run on a host, detached from the ssh connection."""
    command = shlex.join(job.supervised(".venv/bin/lm"))
    return f"cd {_folder(slices)} || exit 1; nohup setsid {command} >../{job.name}.log 2>&1 </dev/null &"


def _folder(slices: Slices) -> str:
    return f"lm-{slices.commit[:12]}"


def _options(**values: str | int | bool | None) -> str:
    """Command-line options (`--zone=… --spot`) of the values that are set."""
    words = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return shlex.join(words)


def _launch(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    topology, slices = pod.requested_slices(arguments, experiment, job.experiment, "the files of the commit only")
    asked = Slices(
        topology=topology,
        slices=slices,
        zone=arguments.zone,
        volumes=parse_volumes(arguments.volume or ()),
        commit=current_commit(),
        project=arguments.project,
        runtime=arguments.runtime_version,
        service_account=values.check_value("--service-account", arguments.service_account, values.ACCOUNT_EMAIL),
        spot=arguments.spot,
        reserved=arguments.reserved,
    )
    handover = render(job, asked)
    pod.check_fits_memory(arguments, experiment, topology, slices)
    return handover_launch(handover)


LAUNCHER = Launcher(
    name="tpu-vm",
    help="""\
queued resources, with gcloud. The hosts get a git bundle of the
current commit and install it""",
    flags=pod.FLAGS
    | {
        "--runtime-version": Flag("NAME", "software version (default: the generation's)", values.RUNTIME.problem),
        "--reserved": Flag(None, "use the project's reservation"),
    },
    launch=_launch,
    required=("--topology", "--zone"),
    join_timeout=pod.JOIN_TIMEOUT,
)
