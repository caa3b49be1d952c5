"""Launcher `gke`: a JobSet with a Job for each slice and a pod for each host, and the equivalent xpk command.

The JobSet controller makes a headless service, so that pods have DNS names. GKE sets `TPU_WORKER_ID`,
`TPU_WORKER_HOSTNAMES` and, with several slices, the `MEGASCALE_…` variables in every pod of a JobSet.
Sources: the JobSet API (jobset.x-k8s.io/v1alpha2); GKE's pages on TPUs, Multislice and Cloud Storage FUSE; the Job API of Kubernetes
(batch/v1).
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lm.experiment import Experiment, UserError
from lm.launch import pod, values
from lm.launch.job import COORDINATOR_PORT, SWEEP_GRACE, Handover, Job, check_experiment_path
from lm.launch.launcher import Flag, Launch, Launcher, SweepWorkers, handover_launch
from lm.launch.topology import SliceTopology, parse_topology
from lm.launch.volumes import Volume, check_run_dir, parse_volumes

REPLICATED_JOB = "slice"
CONTAINER = "lm"
EXIT_USER = 2  # exit code of `lm run` after a user's error, which a restart does not fix
MOST_LETTERS = 63  # maximal length of a pod's name
FILES = "the files of the image only"


@dataclass(frozen=True)
class Cluster:
    """Options of a job on GKE: slices, image, volumes and names in the cluster."""

    topology: SliceTopology
    slices: int
    image: str
    volumes: tuple[Volume, ...]
    namespace: str | None = None
    queue: str | None = None
    service_account: str | None = None
    secret: str | None = None
    spot: bool = False
    cluster: str | None = None  # used in the xpk command only, as project and zone
    project: str | None = None
    zone: str | None = None


def render(job: Job, cluster: Cluster) -> Handover:
    """Render the manifest for `kubectl apply -f -`.

    Raises:
        UserError: the run folder would be lost with its container, or a pod's name would be too long.
    """
    check_run_dir(job.run_dir, cluster.volumes, "is inside the container, and lost with it")
    longest = f"{job.name}-{REPLICATED_JOB}-{cluster.slices - 1}-{cluster.topology.hosts - 1}-abcde"
    if len(longest) > MOST_LETTERS:
        raise UserError(
            f"--job-name {job.name!r} is too long: the pod's name {longest} has more than {MOST_LETTERS} characters"
        )
    head = ["# A JobSet for `kubectl apply -f -`.", *_xpk_comment(job, cluster)]
    body = yaml.safe_dump(manifest(job, cluster), sort_keys=False, width=1000)
    where = f" -n {cluster.namespace}" if cluster.namespace else ""
    follow = f"kubectl logs -f job/{job.name}-{REPLICATED_JOB}-0 -c {CONTAINER}{where}"
    return Handover(
        text="\n".join(head) + "\n" + body,
        command=("kubectl", "apply", "-f", "-"),
        tools=("kubectl",),
        next=(f"watch: {follow}", f"stop: kubectl delete jobset {job.name}{where}"),
    )


def manifest(job: Job, cluster: Cluster) -> dict[str, Any]:
    """The JobSet as a plain value: all pods restart together after a death, none after a user's error."""
    # A slice is a node pool: all its pods must be in one, and no other slice in the same.
    pools = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    rule = {"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job.name, cluster) | {"annotations": pools},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [rule]},
            "replicatedJobs": [
                {
                    "name": REPLICATED_JOB,
                    "replicas": cluster.slices,
                    "template": {"spec": _job_spec(job, cluster)},
                }
            ],
        },
    }


def _metadata(name: str, cluster: Cluster) -> dict[str, Any]:
    namespace = {"namespace": cluster.namespace} if cluster.namespace else {}
    labels = {"labels": {"kueue.x-k8s.io/queue-name": cluster.queue}} if cluster.queue else {}
    return {"name": name} | namespace | labels


def _job_spec(job: Job, cluster: Cluster) -> dict[str, Any]:
    """The Job of one slice: a pod per host, none of which restarts alone."""
    hosts = cluster.topology.hosts
    on_exit = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_USER]}
    metadata = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}} if _has_buckets(cluster) else {}
    environment, wrapper = _join_variables(job, cluster)
    words = [*wrapper, *(literal(word) for word in job.command("lm"))]
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": on_exit}]},
        "template": metadata | {"spec": pod_spec(words, environment, job.grace, cluster)},
    }


def pod_spec(command: list[str], environment: list[dict[str, Any]], grace: int, cluster: Cluster) -> dict[str, Any]:
    """A pod that runs a command with all chips of one host, and has `grace` seconds to end."""
    topology = cluster.topology
    selector = {
        "cloud.google.com/gke-tpu-accelerator": topology.generation.label,
        "cloud.google.com/gke-tpu-topology": topology.shape,
    }
    if cluster.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    spec: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": grace}
    if cluster.slices > 1:  # the data-centre network between slices, without a layer in between
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    spec |= {"nodeSelector": selector, "containers": [_container(command, environment, cluster)]}
    return spec | {"volumes": [_volume(i, cluster) for i in range(len(cluster.volumes))]}


def literal(word: str) -> str:
    """Escape a word of a command for Kubernetes, which expands $(NAME): every $ is doubled."""
    return word.replace("$", "$$")


def _container(command: list[str], environment: list[dict[str, Any]], cluster: Cluster) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": cluster.image,
        "command": command,
        "resources": {"limits": {"google.com/tpu": cluster.topology.chips_per_host}},
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # between hosts of a slice, between slices
    }
    if environment:
        container["env"] = environment
    if cluster.secret:
        container["envFrom"] = [{"secretRef": {"name": cluster.secret}}]
    mounts = [{"name": f"storage-{i}", "mountPath": volume.path} for i, volume in enumerate(cluster.volumes)]
    return container | {"volumeMounts": mounts}


def _join_variables(job: Job, cluster: Cluster) -> tuple[list[dict[str, Any]], list[str]]:
    """Environment variables by which the processes find each other, and a shell wrapper that computes JAX_PROCESS_ID."""
    hosts = cluster.topology.hosts
    processes = hosts * cluster.slices
    if processes == 1:
        return [], []
    first = f"{job.name}-{REPLICATED_JOB}-0-0.{job.name}"
    index = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
    environment: list[dict[str, Any]] = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{COORDINATOR_PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(processes)},
        {"name": "SLICE_INDEX", "valueFrom": index},
    ]
    # Kubernetes sets JOB_COMPLETION_INDEX, the number of the pod within its slice.
    script = f'export JAX_PROCESS_ID=$((SLICE_INDEX * {hosts} + JOB_COMPLETION_INDEX)); exec "$@"'
    return environment, ["bash", "-c", script.replace("$", "$$"), "bash"]


def _volume(index: int, cluster: Cluster) -> dict[str, Any]:
    volume = cluster.volumes[index]
    name = {"name": f"storage-{index}"}
    if volume.claim:
        return name | {"persistentVolumeClaim": {"claimName": volume.claim}}
    attributes = {"bucketName": volume.bucket, "mountOptions": "implicit-dirs"}
    if cluster.slices > 1:  # with the host's network, the driver has to be told to use the pod's account
        attributes["hostNetworkPodKSA"] = "true"
    return name | {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def _has_buckets(cluster: Cluster) -> bool:
    return any(volume.bucket for volume in cluster.volumes)


def _xpk_comment(job: Job, cluster: Cluster) -> list[str]:
    """The equivalent xpk command as a comment; none for hosts without four chips or a command with line breaks."""
    command = shlex.join(job.command("lm"))
    if cluster.topology.chips_per_host != 4 or cluster.topology.chips == 4 or not command.isprintable():
        return []
    options = {
        "workload": job.name,
        "cluster": cluster.cluster or "CLUSTER",
        "project": cluster.project or "PROJECT",
        "zone": cluster.zone or "ZONE",
        "tpu-type": f"{cluster.topology.generation.prefix}-{cluster.topology.shape}",
        "num-slices": str(cluster.slices),
        "docker-image": cluster.image,
        "max-restarts": str(job.max_restarts),
        "restart-on-exit-codes": "1,75",  # a crash, and the watchdog; xpk adds those of signals
        "termination-grace-period-seconds": str(job.grace),
        "command": command,
    }
    words = [f"--{name}={value}" for name, value in options.items()] + (["--spot"] if cluster.spot else [])
    return [
        "# The same by xpk, on a cluster that has the storage attached (xpk storage attach):",
        f"#   xpk workload create {shlex.join(words)}",
    ]


def sweep_workers(name: str, words: list[str], count: int, folders: Mapping[str, str], cluster: Cluster) -> Handover:
    """Render a Job of `count` pods for `kubectl apply -f -`, each with all chips of one host.

    Raises:
        UserError: the slice has several hosts, or a folder is not on a volume that supports file locks.
    """
    if cluster.topology.hosts > 1:
        raise UserError(
            f"--topology of {cluster.topology.shape} has {cluster.topology.hosts} hosts, but a sweep worker uses one: use a slice "
            "of one host, or launch each trial with lm launch"
        )
    locked = tuple(volume for volume in cluster.volumes if volume.claim)
    for flag, folder in folders.items():
        check_run_dir(folder, locked, "is on no volume claim (pvc:), and in a bucket files cannot be locked", flag)
    body = yaml.safe_dump(_workers_manifest(name, words, count, cluster), sort_keys=False, width=1000)
    where = f" -n {cluster.namespace}" if cluster.namespace else ""
    return Handover(
        text="# Workers of a sweep, for `kubectl apply -f -`.\n" + body,
        command=("kubectl", "apply", "-f", "-"),
        tools=("kubectl",),
        next=(f"watch: kubectl logs -f job/{name} --all-pods{where}", f"stop: kubectl delete job {name}{where}"),
    )


def _workers_manifest(name: str, words: list[str], count: int, cluster: Cluster) -> dict[str, Any]:
    refused = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_USER]}
    environment = [{"name": "JAX_NUM_PROCESSES", "value": "1"}]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name, cluster),
        "spec": {
            "parallelism": count,
            "completions": count,
            "backoffLimit": 20 * count,  # preemptions are more frequent than workers' deaths
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": refused}]},
            "template": {"spec": pod_spec(["lm", *map(literal, words)], environment, SWEEP_GRACE, cluster)},
        },
    }


def _options(arguments: argparse.Namespace, topology: SliceTopology, slices: int) -> Cluster:
    """The cluster options from the flags that launches and sweeps share."""
    return Cluster(
        topology=topology,
        slices=slices,
        image=arguments.image,
        volumes=parse_volumes(arguments.volume or ()),
        namespace=arguments.namespace,
        queue=arguments.queue,
        service_account=values.check_value("--service-account", arguments.service_account, values.OBJECT),
        secret=arguments.secret,
        spot=arguments.spot,
    )


def _launch(arguments: argparse.Namespace, experiment: Experiment, job: Job) -> Launch:
    topology, slices = pod.requested_slices(arguments, experiment, job.experiment, FILES)
    xpk = {"cluster": arguments.cluster, "project": arguments.project, "zone": arguments.zone}
    handover = render(job, dataclasses.replace(_options(arguments, topology, slices), **xpk))
    pod.check_fits_memory(arguments, experiment, topology, slices)
    return handover_launch(handover)


def _hand_over_workers(
    arguments: argparse.Namespace, name: str, words: list[str], folders: Mapping[str, str]
) -> Handover:
    check_experiment_path(arguments.sweep, FILES)
    cluster = _options(arguments, parse_topology(arguments.topology), 1)
    return sweep_workers(name, words, arguments.workers, folders, cluster)


LAUNCHER = Launcher(
    name="gke",
    help="""\
a JobSet, with kubectl. The image contains this repository as its
working folder and `lm` on its PATH (see the Dockerfile)""",
    flags=pod.FLAGS
    | {
        "--image": Flag("IMAGE", "container image with this repository", values.image_problem),
        "--namespace": Flag("NAME", "Kubernetes namespace (default: kubectl's)", values.NAMESPACE.problem),
        "--queue": Flag("NAME", "LocalQueue of Kueue", values.QUEUE.problem),
        "--secret": Flag("NAME", "Kubernetes Secret whose entries become environment variables", values.OBJECT.problem),
        "--cluster": Flag("NAME", "cluster name, for the xpk command only", values.CLUSTER.problem),
    },
    launch=_launch,
    required=("--topology", "--image"),
    max_restarts=20,
    join_timeout=pod.JOIN_TIMEOUT,
    workers=SweepWorkers(
        ("--topology", "--volume", "--image", "--namespace", "--queue", "--secret", "--service-account", "--spot"),
        _hand_over_workers,
    ),
)
