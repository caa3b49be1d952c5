"""The script for TPU VMs, run to its end with a gcloud that has a folder for every host instead of machines."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lm.experiment import UserError
from lm.launch.job import Job, hand_over
from lm.launch.topology import parse_topology
from lm.launch.tpu_vm import Slices, current_commit, render
from lm.launch.volumes import parse_volume

# `gcloud compute tpus GROUP VERB …`: notes its words; two hosts a node, in which `ssh` runs what it is told.
GCLOUD = """#!{python}
import os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path({cloud!r})
words = sys.argv[1:]
with (cloud / "calls").open("a") as calls:
    calls.write(repr(words) + "\\n")
verb = words[3]
rest = [word for word in words[4:] if not word.startswith("--")]
if verb == "describe":
    seen = cloud / "waited"
    print("ACTIVE" if seen.exists() else "WAITING_FOR_RESOURCES")
    seen.touch()
hosts = [cloud / f"{{rest[-1].rstrip(':')}}-w-{{i}}" for i in range(2)]
for host in hosts if verb in ("scp", "ssh") else []:
    host.mkdir(exist_ok=True)
    if verb == "scp":
        for file in rest[:-1]:
            shutil.copy(file, host)
    else:
        command = next(word.split("=", 1)[1] for word in words if word.startswith("--command="))
        subprocess.run(["bash", "-c", command], cwd=host, env=os.environ | {{"HOME": str(host)}}, check=True)
"""

# The repository that is launched: its own way to make .venv ready, whose `lm` says with what it was started.
ENVIRONMENT = """
prepare() {
    mkdir -p .venv/bin
    printf '#!/bin/bash\\ngit rev-parse HEAD\\nprintf "%%s\\\\n" "$1" "$@" >&2\\ntouch ../started\\n' >.venv/bin/lm
    chmod +x .venv/bin/lm
    echo "$1" >prepared
}
"""


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def git(*words: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, in which we are; gcloud and what hosts have are first on PATH."""
    place = tmp_path / "repository"
    (place / "scripts").mkdir(parents=True)
    monkeypatch.chdir(place)
    (place / "scripts" / "environment.sh").write_text(ENVIRONMENT)
    (place / "pod.py").write_text("experiment = None\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    cloud, programs = tmp_path / "cloud", tmp_path / "programs"
    cloud.mkdir()
    program(programs, "gcloud", GCLOUD.format(python=sys.executable, cloud=str(cloud)))
    program(programs, "python3.11", "#!/bin/bash\n")
    program(programs, "sudo", '#!/bin/bash\nexec "$@"\n')
    program(programs, "sleep", "#!/bin/bash\n")
    program(programs, "gcsfuse", '#!/bin/bash\necho "$@" >"$HOME/mounted"\n')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("USER", "nobody")
    program(programs, "chown", "#!/bin/bash\n")
    return cloud


def job(run_dir: str, **changes) -> Job:
    values = {"name": "pod-run", "experiment": "pod.py", "overrides": ("--prompts", 'it\'s "it"'), "run_dir": run_dir}
    return Job(**(values | {"until": None, "max_restarts": 4, "grace": 60} | changes))


def asked(commit: str, volume: str, topology: str = "v5e:2x2", slices: int = 2, **changes) -> Slices:
    return Slices(parse_topology(topology), slices, "us-west4-a", (parse_volume(volume),), commit, **changes)


def test_every_host_gets_the_commit_the_storage_and_a_supervisor_with_the_same_words(repository, tmp_path):
    storage = tmp_path / "mnt"
    commit = current_commit()
    handover = render(job(f"{storage}/pod"), asked(commit, f"gs://my-runs:{storage}", spot=True))
    # The hosts' commands are waited for here, so that they have ended when the script has.
    text = handover.text.replace("</dev/null &'", "</dev/null & wait'")
    assert text != handover.text
    hand_over(type(handover)(text, handover.command, handover.tools, handover.next))

    hosts = sorted(path for path in repository.iterdir() if path.is_dir())
    assert [host.name for host in hosts] == ["pod-run-0-w-0", "pod-run-0-w-1", "pod-run-1-w-0", "pod-run-1-w-1"]
    for host in hosts:
        assert (host / f"lm-{commit[:12]}" / "prepared").read_text() == "tpu\n"
        assert (host / "mounted").read_text() == f"--implicit-dirs my-runs {storage}\n"
        said = (host / "pod-run.log").read_text()
        assert commit in said
        words = f"launch pod.py --on local --max-restarts 4 --grace 60 --run-dir {storage}/pod --prompts".split()
        assert all(word in said.splitlines() for word in [*words, 'it\'s "it"']), said
    calls = [eval(line) for line in (repository / "calls").read_text().splitlines()]
    assert calls[0][:4] == ["compute", "tpus", "queued-resources", "create"]
    assert {"--accelerator-type=v5litepod-4", "--node-count=2", "--node-prefix=pod-run", "--spot"} <= set(calls[0])
    assert [call[3] for call in calls[1:3]] == ["describe", "describe"], "it waits until the slices are there"
    assert all("--zone=us-west4-a" in call for call in calls)


def test_what_no_commit_has_is_refused(repository):
    current_commit()
    Path("data.bin").write_text("untracked files stay here, and may")
    current_commit()
    Path("pod.py").write_text("experiment = 1\n")
    with pytest.raises(UserError, match="1 files differ from it: commit them first"):
        current_commit()


def test_a_folder_without_a_repository_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="no git repository"):
        current_commit()


def test_no_address_of_the_repository_is_rendered(repository):
    """The address of a remote may hold a token; the code travels without it."""
    git("remote", "add", "origin", "https://somebody:sesame@example.com/lm.git")
    text = render(job("/mnt/runs/pod"), asked(current_commit(), "gs://my-runs:/mnt/runs")).text
    assert "sesame" not in text and "example.com" not in text


def test_a_refusal_of_gcloud_ends_it(repository, capfd):
    program(Path(os.environ["PATH"].split(":")[0]), "gcloud", "#!/bin/bash\necho 'no quota' >&2\nexit 1\n")
    with pytest.raises(UserError, match="bash -s failed with exit code 1"):
        hand_over(render(job("/mnt/runs/pod"), asked(current_commit(), "gs://my-runs:/mnt/runs")))
    assert "no quota" in capfd.readouterr().err


@pytest.mark.parametrize("topology, volume, run_dir, words", [
    ("tpu7x:2x2x1", "gs://my-runs:/mnt/runs", "/mnt/runs/pod", "tpu7x is available on GKE only"),
    ("v5e:4x4", "pvc:runs:/mnt/runs", "/mnt/runs/pod", "for Kubernetes only"),
    ("v5e:4x4", "gs://my-runs:/mnt/runs", "runs/pod", "disk of each host"),
])  # fmt: skip
def test_what_tpu_vms_do_not_have(topology, volume, run_dir, words):
    with pytest.raises(UserError, match=words):
        render(job(run_dir), asked("0" * 40, volume, topology, 1))


def test_words_survive_two_shells():
    text = render(job("/mnt/runs/pod", overrides=("--name", "$HOME `id` '\"")), asked("0" * 40, "gs://my-runs:/mnt/runs")).text  # fmt: skip
    line = next(line for line in text.splitlines() if "--command=" in line and "nohup" in line)
    (flag,) = shlex.split(line)
    assert "$HOME `id` '\"" in shlex.split(flag.removeprefix("--command=").split("setsid ")[1])
