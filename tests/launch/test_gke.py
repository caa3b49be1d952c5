"""The JobSet has only fields that the CRD knows, of its types, and its parts agree with each other and with the slice."""

import copy
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lm.launch.topology import parse_topology
from tests.launch.cases import CASES, GOLDEN

SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
MANIFESTS = {name: yaml.safe_load((GOLDEN / name).read_text()) for name in CASES if name.endswith(".yaml")}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def violations(value, schema, where="") -> list[str]:
    """Where a value breaks a schema that is made of the keywords which jobset_schema.json uses."""
    if "$ref" in schema:
        return violations(value, SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]], where)
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where} is {value!r}"]
    if type(value) is not TYPES[schema["type"]]:
        return [f"{where} is {value!r}, no {schema['type']}"]
    found = [f"{where} lacks {name}" for name in schema.get("required", []) if name not in value]
    low, form = schema.get("minimum"), schema.get("pattern")
    if (low is not None and value < low) or (form and not re.search(form, value)):
        found.append(f"{where} is {value!r}")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            inside = known.get(name, rest)
            found += violations(item, inside, f"{where}.{name}") if inside else [f"{where} has no field {name}"]
    if isinstance(value, list):
        found += [line for i, item in enumerate(value) for line in violations(item, schema["items"], f"{where}[{i}]")]
    return found


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_crd_knows_every_field(name):
    assert violations(MANIFESTS[name], SCHEMA) == []


@pytest.mark.parametrize("path, value", [
    (("spec", "maxRestarts"), 3),
    (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
    (("spec", "replicatedJobs", 0, "replicas"), "2"),
    (("metadata", "name"), "pod_run"),
])  # fmt: skip
def test_the_schema_refuses_what_the_crd_would(path, value):
    manifest = copy.deepcopy(MANIFESTS["gke_one_slice.yaml"])
    inside = manifest
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = value
    assert len(violations(manifest, SCHEMA)) == 1


def parts(name):
    """(replicated job, its job, its pod, its container) of a manifest."""
    (replicated,) = MANIFESTS[name]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


@pytest.mark.parametrize(
    "name, topology, slices",
    [
        ("gke_one_slice.yaml", "v5e:4x4", 1),
        ("gke_one_host.yaml", "v6e:2x2", 1),
        ("gke_two_slices.yaml", "v5p:2x2x4", 2),
    ],
)
def test_pods_and_chips_are_those_of_the_slices(name, topology, slices):
    replicated, job, pod, container = parts(name)
    assert replicated["replicas"] == slices
    assert job["parallelism"] == job["completions"]
    chips = job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == parse_topology(topology).chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]


@pytest.mark.parametrize("name", MANIFESTS)
def test_its_parts_agree(name):
    _, job, pod, container = parts(name)
    assert pod["restartPolicy"] == "Never" and job["completionMode"] == "Indexed", "a pod failure policy needs both"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    words = container["command"]
    run_dir = words[words.index("--run-dir") + 1]
    assert any(run_dir.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"])


@pytest.mark.parametrize("name, count", [("gke_one_slice.yaml", 4), ("gke_two_slices.yaml", 8)])
def test_the_processes_are_numbered_and_meet_at_the_first_pod(name, count):
    """Run the container's command with bash, as Kubernetes would for every pod: $$ is $, $(NAME) is a variable."""
    replicated, job, _, container = parts(name)
    constant = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    assert constant["JAX_NUM_PROCESSES"] == str(count)
    jobset = MANIFESTS[name]["metadata"]["name"]
    assert constant["JAX_COORDINATOR_ADDRESS"] == f"{jobset}-{replicated['name']}-0-0.{jobset}:8482"
    words = [word.replace("$$", "$") for word in container["command"]]
    start = words.index("lm")
    told = []
    for index in range(replicated["replicas"]):
        for pod in range(job["completions"]):
            variables = {"SLICE_INDEX": str(index), "JOB_COMPLETION_INDEX": str(pod), "PATH": "/usr/bin:/bin"}
            show = ["bash", "-c", 'printf "%s\\n" "$JAX_PROCESS_ID" "$@"', "bash"]
            ran = subprocess.run([*words[:start], *show, *words[start:]], env=variables, capture_output=True, text=True)
            number, *arguments = ran.stdout.splitlines()
            told.append(int(number))
            assert arguments == words[start:]
    assert told == list(range(count))


def test_one_process_joins_nothing():
    _, _, _, container = parts("gke_one_host.yaml")
    assert "env" not in container and container["command"][0] == "lm"
