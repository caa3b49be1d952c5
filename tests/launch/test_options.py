"""What a user can get wrong at `lm launch` gives one clear line before anything is launched."""

import subprocess
import sys
from pathlib import Path

import pytest

from lm.cli.main import main
from tests.launch.cases import EXPERIMENT

GKE = "--on gke --topology v5e:4x4 --image lm:1 --volume gs://my-runs:/mnt/runs --run-dir /mnt/runs/pod"
TPU_VM = "--on tpu-vm --topology v5e:4x4 --zone us-west4-a --volume gs://my-runs:/mnt/runs --run-dir /mnt/runs/pod"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pod.py").write_text(EXPERIMENT)
    return tmp_path


def launch(*words: str) -> int:
    return main(["launch", "pod.py", *words])


@pytest.mark.parametrize("words, told", [
    ("--dry-run", ["--on"]),
    ("--on mars", ["mars", "gke", "tpu-vm", "slurm", "local"]),
    ("--on gke", ["--on gke needs --topology", "v5p:2x4x4"]),
    ("--on gke --topology v5e:4x4", ["--on gke needs --image"]),
    ("--on gke --topology v5e:5x5 --image lm:1", ["'5x5'", "1x1, 2x2, 2x4, 4x4"]),
    ("--on gke --topology v5e:4x4 --image lm:1 --run-dir /mnt/runs/pod", ["/mnt/runs/pod is inside the container", "--volume gs://"]),
    (f"{GKE} --run-dir runs/pod", ["runs/pod is inside the container", "/mnt/runs"]),
    (f"{GKE} --volume /mnt/runs", ["--volume '/mnt/runs'", "gs://BUCKET:/PATH", "pvc:CLAIM:/PATH"]),
    (f"{GKE} --partition gpu", ["--partition is for --on slurm; this is --on gke"]),
    (f"{GKE} --job-name Pod_Run", ["--job-name is 'Pod_Run'", "lowercase"]),
    (f"{GKE} --job-name {'a' * 40}", ["at most 39 characters"]),
    (f"{GKE} --name 7b", ["from the experiment's name '7b'", "begin with a letter"]),
    (f"{GKE} --mesh.fsdp 8", ["--topology v5e:4x4 has 16 devices", "fsdp 8", "uses 8", "-1"]),
    (f"{GKE} --mesh.fsdp 32", ["--topology v5e:4x4", "needs 32 devices; there are 16"]),
    (f"{GKE} --slices 2", ["--topology v5e:4x4 --slices 2", "mesh.slices is 1; it should be 2"]),
    (f"{GKE} --mesh.slices 2", ["mesh.slices is 2; it should be 1"]),
    (f"{GKE} --pretrain.batch_size 24", ["24 rows", "mesh.fsdp 16"]),
    (f"{GKE} --mesh.fsdp 2 --mesh.tensor 8", ["model.num_heads 4", "mesh.tensor 8"]),
    (f"{GKE} --pretrain.stepz 3", ["--pretrain.stepz", "pretrain.steps"]),
    (f"{GKE} --until sft", ["no stage 'sft'", "pretrain"]),
    (f"{GKE} --fresh yes", ["no knob '--fresh'"]),
    ("--on tpu-vm --topology v5e:4x4", ["--on tpu-vm needs --zone"]),
    (f"{TPU_VM} --image lm:1", ["--image is for --on gke; this is --on tpu-vm"]),
    (TPU_VM, ["this folder is in no git repository"]),
    ("--on slurm --nodes 2 --pretrain.batch_size 3", ["--nodes 2", "mesh.fsdp"]),
    ("--on slurm --nodes 0", ["from 1 to"]),
    ("--on local --processes 2 --devices-per-process 3", ["mesh.fsdp 6"]),
    ("--on local --grace soon", ["'soon'", "an integer"]),
])  # fmt: skip
def test_a_wrong_launch_is_refused(work, capsys, monkeypatch, words, told):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(work.parent))
    assert launch(*words.split()) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("lm: error: ") and len(said.splitlines()) == 1, said
    for word in told:
        assert word in said, said
    assert [path.name for path in work.iterdir()] == ["pod.py"]


@pytest.mark.parametrize("on", [GKE, TPU_VM])
def test_an_experiment_that_does_not_travel_is_refused(work, capsys, on):
    assert main(["launch", str(work / "pod.py"), *on.split()]) == 2
    assert "name a file below this folder" in capsys.readouterr().err


@pytest.mark.parametrize("on, tool", [(GKE, "kubectl"), ("--on slurm --run-dir runs/pod", "sbatch")])
def test_a_missing_tool_is_named(capsys, monkeypatch, work, on, tool):
    monkeypatch.setenv("PATH", str(work))
    assert launch(*on.split()) == 2
    assert capsys.readouterr().err.endswith(
        f"lm: error: {tool} is not on PATH; --dry-run prints its input, for use on a machine that has it\n"
    )


def test_a_tool_gets_exactly_what_a_dry_run_prints(capfd, monkeypatch, work):
    tool = work / "kubectl"
    tool.write_text('#!/bin/sh\necho "$@" >words\ncat >manifest\necho applied\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{work}:/usr/bin:/bin")
    assert launch(*GKE.split(), "--dry-run") == 0
    printed = capfd.readouterr().out
    assert launch(*GKE.split()) == 0
    assert (work / "manifest").read_text() == printed
    assert (work / "words").read_text() == "apply -f -\n"
    said = capfd.readouterr().out
    assert "applied" in said and "stop: kubectl delete jobset pod-run" in said


def test_a_run_folder_that_looks_local_is_told(capsys, work):
    assert launch(*f"--on slurm --run-dir {work}/runs --dry-run".split()) == 0
    told = capsys.readouterr().err
    assert (str(work).startswith("/tmp/")) == ("looks like a folder local to each machine" in told)


def test_a_token_in_the_environment_is_not_rendered(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open")
    for words in (GKE, "--on slurm", "--on local --processes 2"):
        assert launch(*words.split(), "--dry-run") == 0
    assert "sesame" not in "".join(capsys.readouterr())


def test_help_answers_without_what_is_slow():
    code = "import sys; from lm.cli.main import main; main(['launch', '--help']); print(*sys.modules)"
    root = Path(__file__).parent.parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert "--topology" in out
    assert not {"jax", "numpy", "flax"} & set(out.splitlines()[-1].split())
