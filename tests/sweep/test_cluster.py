"""Workers that are handed over to a cluster: what is rendered, and what is refused."""

import subprocess

import pytest
import yaml

from lm.cli.main import main

SWEEP = "tests/sweep/tiny.py"
GKE = ["--on", "gke", "--topology", "v5e:2x2", "--image", "lm:1", "--dry-run"]
CLAIM = ["--volume", "pvc:runs:/mnt/runs", "--folder", "/mnt/runs/tiny", "--store", "/mnt/runs/shared"]


def slurm_script(capsys, *words):
    assert main(["sweep", SWEEP, "--on", "slurm", "--workers", "4", "--time", "4:00:00", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_slurm_gets_an_array_of_workers_that_save_before_their_time_is_up(capsys, tmp_path):
    script = slurm_script(capsys, "--gpus-per-node", "1")
    for line in ("array=1-4", "time=4:00:00", "gpus-per-node=1", "signal=B:USR1@300"):
        assert f"#SBATCH --{line}\n" in script
    assert f"sweep {SWEEP} --folder sweeps/tiny --store sweeps/shared &" in script
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)


def test_a_slurm_worker_has_all_cores_of_its_node_unless_it_asks_for_gpus(capsys):
    assert "#SBATCH --exclusive\n" in slurm_script(capsys)
    assert "exclusive" not in slurm_script(capsys, "--gpus-per-node", "1")


def test_gke_gets_a_job_of_as_many_pods(capsys):
    assert main(["sweep", SWEEP, *GKE, *CLAIM, "--workers", "3", "--namespace", "research", "--spot"]) == 0
    job = yaml.safe_load(capsys.readouterr().out)
    assert (job["kind"], job["metadata"]) == ("Job", {"name": "tiny", "namespace": "research"})
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (3, 3)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["lm", "sweep", SWEEP, "--folder", "/mnt/runs/tiny", "--store", "/mnt/runs/shared"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["volumes"] == [{"name": "storage-0", "persistentVolumeClaim": {"claimName": "runs"}}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GKE, "--volume", "gs://runs:/mnt/runs", "--folder", "/mnt/runs/tiny"], "in a bucket files cannot be locked"),
        ([*GKE[:2], "--topology", "v5e:4x4", *GKE[4:], *CLAIM], "use a slice of one host"),
        (["--on", "gke", "--image", "lm:1", "--dry-run"], "--on gke needs --topology"),
        (["--time", "3"], "--time is for --on slurm"),
        (["--on", "slurm", "--image", "lm:1", "--dry-run"], "--image is for --on gke"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused_in_a_line(words, message, capsys):
    assert main(["sweep", SWEEP, *words]) == 2
    said = capsys.readouterr().err
    assert message in said.replace("\n", " ") and said.count("\n") == 1
