"""`lm launch --on local` with real runs: what a death costs, and that it changes nothing in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.cli.main import main
from lm.launch.local import newest_checkpoint
from lm.train.checkpoint import Checkpoints
from lm.train.loaded_run import load_run
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 60, 10

EXPERIMENT = f"""
from lm.experiment import Experiment, Mesh, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

experiment = Experiment(
    name="small",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=384),
    model=Model(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64, max_len=64),
    mesh=Mesh(data=1, fsdp=-1),
    stages=(
        Stage("pretrain", Pretrain(), (Source("text.txt", holdout=0.2),), Optimizer(warmup_steps=2), {STEPS}, 8, 64, save_every={SAVE_EVERY}),
    ),
)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(EXPERIMENT)
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (6000, 5))
    words = np.array(["".join(word) for word in letters]).reshape(-1, 50)
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(line) for line in words))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def launched(run_dir: str, processes: int, *words: str) -> subprocess.Popen:
    """The supervisor, in a process of its own, of two devices in all."""
    shape = ["--processes", str(processes), "--devices-per-process", str(2 // processes), "--run-dir", run_dir]
    command = [sys.executable, "-m", "lm.cli.main", "launch", "small.py", "--on", "local", *shape, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(process: subprocess.Popen) -> dict[int, int]:
    """The process ids of the runs below a supervisor, by their number in the job."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        number = next((v.split("=")[1] for v in variables if v.startswith("JAX_PROCESS_ID=")), "0")
        found[int(number)] = int(pid)
    return found


def until_saved(run_dir: str, process: subprocess.Popen, before: str = "the beginning") -> str:
    """Wait for a newer checkpoint than that one; says which there is."""
    folder = RunFolder(Path(run_dir))
    while (newest := newest_checkpoint(folder, ["pretrain"])) == before:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    return newest


def result(run_dir: Path):
    """What must not depend on deaths: the last model, and the loss of every step."""
    steps = read_lines(run_dir / "stages" / "pretrain" / "metrics.jsonl")
    return load_run(run_dir).model, [(line["step"], line["loss"], line["grad_norm"]) for line in steps]


@pytest.mark.slow
def test_a_run_that_lost_a_process_and_was_stopped_ends_as_an_undisturbed_one_to_the_bit(work):
    processes = 2
    quiet = launched("quiet", processes)
    said, _ = quiet.communicate(timeout=900)
    assert quiet.returncode == 0, said

    first = launched("shot", processes)
    saved = until_saved("shot", first)
    os.kill(children(first)[processes - 1], signal.SIGKILL)  # in the middle of a step
    until_saved("shot", first, saved)
    first.terminate()  # all save, and it is over
    said, _ = first.communicate(timeout=900)
    assert first.returncode == 130, said
    told = [line.removeprefix("lm launch: ") for line in said.splitlines() if line.startswith("lm launch: ")]
    assert len(told) == 2, said
    assert told[0].startswith(f"process {processes - 1} of {processes} was killed by SIGKILL")
    assert "restart 1 of 3 without a new checkpoint, from step" in told[0]
    assert told[1] == "SIGTERM: stopping, with 300 s to save"
    stopped = Checkpoints(work / "shot/stages/pretrain/checkpoints").steps()[-1]
    assert stopped < STEPS and f"saved at step {stopped} of {STEPS}" in said

    second = launched("shot", processes)
    said, _ = second.communicate(timeout=900)
    assert second.returncode == 0, said
    (model, losses), (expected_model, expected_losses) = result(work / "shot"), result(work / "quiet")
    assert [step for step, *_ in losses] == list(range(1, STEPS + 1))
    assert losses == expected_losses
    for got, expected in zip(jax.tree.leaves(model), jax.tree.leaves(expected_model), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_an_error_of_the_users_is_not_tried_again(work):
    process = launched("out", 1, "--pretrain.sources.0.path", "txet.txt")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 2
    lines = said.strip().splitlines()
    assert lines[0].startswith("lm: error: ") and "txet.txt" in lines[0]
    assert lines[1:] == ["lm launch: process 0 of 1 ended with code 2: a restart would end in the same error"]


@pytest.mark.slow
def test_several_processes_begin_with_a_folder_that_is_the_runs(work, capsys):
    """Before anything is started: a folder of another experiment, or one in use, is refused with one line."""
    folder = RunFolder(work / "out")
    assert main(["run", "small.py", "--run-dir", "out", "--pretrain.steps", "2"]) == 0
    capsys.readouterr()
    words = ["launch", "small.py", "--on", "local", "--processes", "2", "--run-dir", "out"]
    assert main(words) == 2
    assert "pretrain.steps: 2 → 60" in capsys.readouterr().err
    with folder.lock():
        assert main(words) == 2
    assert "in use by process" in capsys.readouterr().err


def test_the_newest_checkpoint_is_of_the_last_stage_that_has_one(tmp_path):
    folder = RunFolder(tmp_path)
    assert newest_checkpoint(folder, ["one", "two"]) == "the beginning"
    for stage, steps in {"one": [5, 10], "two": [3]}.items():
        with Checkpoints(folder.checkpoints(stage)) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"policy": {"w": jax.numpy.ones(2)}}, {})
        assert newest_checkpoint(folder, ["one", "two"]) == f"step {steps[-1]} of {stage}"
    unfinished = folder.checkpoints("two") / "00000007"
    unfinished.mkdir()
    (unfinished / "data").write_text(json.dumps("of a save that was killed"))
    assert newest_checkpoint(folder, ["one", "two"]) == "step 3 of two"
