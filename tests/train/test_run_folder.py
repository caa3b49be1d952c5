"""One process at a time, one experiment a folder, and nothing of an old run is ever lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.experiment import UserError
from lm.stored import read_json, write_json_atomic
from lm.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from lm.train.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def experiment(steps=100, seed=0) -> dict:
    return {
        "name": "x",
        "seed": seed,
        "stages": (
            {"name": "sft", "objective": {"kind": "SFT"}, "steps": steps},
            {"name": "dpo", "objective": {"kind": "DPO"}, "steps": 5},
        ),
    }


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "x")


@pytest.fixture
def holder(folder):
    """Another process that holds the lock of `folder`."""
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_layout(folder):
    assert folder.stage_folder("sft") == folder.path / "stages" / "sft"
    assert folder.checkpoints("sft") == folder.path / "stages" / "sft" / "checkpoints"
    assert not folder.finished("sft")
    folder.stage_folder("sft").mkdir(parents=True)
    write_json_atomic(folder.summary("sft"), {})
    assert folder.finished("sft")


def test_a_second_process_is_told_who_holds_the_folder(folder, holder):
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on "), folder.lock():
        pass
    with pytest.raises(UserError, match="in use by"):
        write_json_atomic(folder.experiment, experiment())
        folder.set_aside()


def test_the_lock_dies_with_its_process(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with folder.lock():
        assert (folder.path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_can_be_taken_again_after_it_was_released(folder):
    for _ in range(2):
        with folder.lock(), pytest.raises(UserError), folder.lock():
            pass


def test_the_same_experiment_goes_on(folder):
    with folder.lock():
        assert folder.claim(experiment()) is False
        assert folder.claim(experiment()) is True
    assert folder.read_experiment()["stages"][0]["steps"] == 100


def begin(folder: RunFolder) -> None:
    folder.stage_folder("sft").mkdir(parents=True)
    (folder.stage_folder("sft") / "metrics.jsonl").write_text("{}\n")


def test_another_experiment_is_refused_with_the_difference_and_the_ways_out(folder):
    folder.claim(experiment(steps=100))
    begin(folder)
    with pytest.raises(UserError) as refusal:
        folder.claim(experiment(steps=200, seed=1))
    text = str(refusal.value)
    assert "sft.steps: 100 → 200" in text and "seed: 0 → 1" in text
    assert "dpo" not in text
    assert "--run-dir" in text and "--fresh" in text
    assert folder.read_experiment()["seed"] == 0


def test_a_folder_where_nothing_was_trained_yet_follows_the_experiment(folder):
    folder.claim(experiment(steps=100))
    folder.tokenizer.mkdir()
    (folder.tokenizer / "tokenizer.model").write_text("learnt from the text of before")
    assert folder.claim(experiment(steps=200)) is False
    assert folder.read_experiment()["stages"][0]["steps"] == 200
    assert not folder.tokenizer.exists()


def test_a_long_difference_is_cut(folder):
    folder.claim(experiment() | {f"knob{i}": 0 for i in range(30)})
    begin(folder)
    with pytest.raises(UserError) as refusal:
        folder.claim(experiment() | {f"knob{i}": 1 for i in range(30)})
    assert str(refusal.value).count("→") == 10 + 1  # the heading has one
    assert "and 20 more" in str(refusal.value)


def test_set_aside_numbers_the_old_folders_and_keeps_what_is_in_them(folder):
    assert folder.set_aside() is None
    for seed in range(3):
        folder.claim(experiment(seed=seed))
        folder.stage_folder("sft").mkdir(parents=True)
        (folder.stage_folder("sft") / "metrics.jsonl").write_text(f"{seed}")
        aside = folder.set_aside()
        assert aside.name == f"x.{seed + 1}" and not folder.path.exists()
    for seed in range(3):
        old = RunFolder(folder.path.with_name(f"x.{seed + 1}"))
        assert old.read_experiment()["seed"] == seed
        assert (old.stage_folder("sft") / "metrics.jsonl").read_text() == f"{seed}"


def test_a_folder_of_something_else_is_left_alone(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("years")
    for attempt in (lambda: folder.claim(experiment()), folder.set_aside):
        with pytest.raises(UserError, match=r"thesis\.tex.*not a run's folder"):
            attempt()
    assert [p.name for p in folder.path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_no_run_is_said_to_be_none(folder):
    with pytest.raises(UserError, match=r"no experiment\.json"):
        folder.read_experiment()


def test_broken_json_is_named(tmp_path):
    (tmp_path / "experiment.json").write_text('{"a": 1,')
    with pytest.raises(UserError, match=r"experiment\.json is not valid JSON"):
        read_json(tmp_path / "experiment.json")


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from lm.train import run_folder
file = Path(sys.argv[1])
run_folder.write_json_atomic(file, {"value": 1})
def half(handle):
    os.ftruncate(handle, 5)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = half
run_folder.write_json_atomic(file, {"value": 2})
"""
    file = tmp_path / "summary.json"
    run = subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, timeout=300)
    assert run.returncode == -signal.SIGKILL
    assert read_json(file) == {"value": 1}


def test_json_that_others_cannot_read_is_not_written(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"value": 1})
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "x.json", {"value": float("nan")})
    assert read_json(tmp_path / "x.json") == {"value": 1}
