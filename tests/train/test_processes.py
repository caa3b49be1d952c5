"""Many processes are one run: the same numbers as one process, stopped together, resumed by another number of them."""

import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.stored import read_json
from lm.train.loaded_run import load_run
from lm.train.metrics import read_lines
from tests import processes
from tests.train.runs import CLOCKS, metrics

pytestmark = pytest.mark.slow

EXPERIMENT = """
from lm.experiment import (
    DPO, GRPO, KTO, PPO, SFT, Collect, Eval, Experiment, LoRA, Mesh, Model, Optimizer, Pretrain, RewardModel, Source, Stage,
    Tokenizer,
)

few = {"optimizer": Optimizer(peak_lr=1e-3, warmup_steps=2), "steps": 3, "batch_size": 4, "save_every": 2}
text = Source("text.txt", holdout=0.2)
preferences = Source("gen:preferences", holdout=0.5)
experiment = Experiment(
    name="smoke",
    tokenizer=Tokenizer(vocab_size=384),
    mesh=Mesh(data=2, fsdp=2),
    model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=128),
    stages=(
        Stage("pretrain", Pretrain(z_loss=1e-4), (text,), seq_len=32, **few),
        Stage("sft", SFT(), (Source("gen:instruct", holdout=0.5),), seq_len=64, **few),
        Stage("preference", DPO(reference="cached"), (preferences,), seq_len=128, **few),
        Stage("judged", KTO(), (preferences,), seq_len=128, **few),
        Stage("scored", RewardModel(), (preferences,), seq_len=128, **few),
        Stage("asked", Collect(judge="scored", max_new_tokens=8), (preferences,), seq_len=96, **few),
        Stage("again", DPO(), (Source("collected:asked", holdout=0.0),), seq_len=96, lora=LoRA(rank=2), **few),
        Stage("ppo", PPO(reward_models=("scored",), max_new_tokens=8, epochs=1), (preferences,), seq_len=96, **few),
        Stage("reason", GRPO("style", group_size=4, max_new_tokens=8, updates_per_rollout=2), (preferences,), seq_len=96, **few),
    ),
    evals=(
        Eval("text", text, "bits_per_byte", count=2),
        Eval("manners", preferences, verifier="style", count=4, max_new_tokens=4, temperature=1.0),
    ),
    prompts=(),
)
"""
# One stage that measures nothing, with enough steps that a signal comes in time.
ALONE = """
import dataclasses
from lm.files import load

few = load("smoke.py")
stage = dataclasses.replace(few.stages[0], steps=40, save_every=5)
experiment = dataclasses.replace(few, stages=(stage,), evals=())
"""
STAGES = ("pretrain", "sft", "preference", "judged", "scored", "asked", "again", "ppo", "reason")
LM = ("-m", "lm.cli.main", "run", "smoke.py")
LONG = ("-m", "lm.cli.main", "run", "alone.py", "--no-report")
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    (root / "smoke.py").write_text(EXPERIMENT)
    (root / "alone.py").write_text(ALONE)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abdeghiklmnoprstu"), rng.integers(2, 7))) for _ in range(200)]
    lines = rng.choice(words, (200, 50))
    (root / "text.txt").write_text("\n\n".join(" ".join(line) for line in lines))
    return root


def numbers(run: Path, stage: str, file: str) -> dict:
    """Every number of a file's lines, by line and name, but how often a margin is positive: at first it is a rounded 0."""
    lines = read_lines(run / "stages" / stage / f"{file}.jsonl")
    return {
        (i, k): v
        for i, line in enumerate(lines)
        for k, v in line.items()
        if k not in (*CLOCKS, "reward_accuracy") and isinstance(v, (int, float))
    }


@pytest.fixture(scope="module")
def one(folder) -> Path:
    processes.run(folder, 1, *LM, "--run-dir", "one", "--no-report")
    return folder / "one"


@pytest.fixture(scope="module")
def many(folder) -> tuple[Path, processes.Processes]:
    """Two processes: four, which compile everything four times, go on from what these saved."""
    return folder / "many", processes.run(folder, 2, *LM, "--run-dir", "many")


def test_every_stage_gives_the_numbers_of_one_process(one, many):
    run, _ = many
    for stage in STAGES:
        assert len(metrics(run, stage)) == 3
        for file in ("metrics", "eval"):
            ours, theirs = (numbers(path, stage, file) for path in (run, one))
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), (stage, file)
        ours, theirs = (read_json(path / "stages" / stage / "summary.json") for path in (run, one))
        assert ours["tokens"] == theirs["tokens"]
    assert sorted(path.name for path in run.glob("stages/*")) == sorted(STAGES)


def test_only_the_first_process_speaks_and_writes(many):
    run, found = many
    assert "reading the data" in found.said(0) and f"report: {run.name}/report.html" in found.said(0)
    assert found.said(1) == ""
    assert (run / "report.html").is_file() and not list(run.glob(".shared-*"))
    assert len(read_json(run / "environment.json")["runs"]) == 1


def until_saving(run: Path, step: int, found: processes.Processes) -> None:
    """Wait until `step` is written down, and a save is under way."""
    checkpoints = run / "stages" / "pretrain" / "checkpoints"
    end = time.monotonic() + processes.PATIENCE
    while time.monotonic() < end and all(process.poll() is None for process in found.running):
        steps = [line["step"] for line in read_lines(run / "stages" / "pretrain" / "metrics.jsonl")]
        if step in steps and any(not (path / "manifest.json").exists() for path in checkpoints.glob("*")):
            return
        time.sleep(0.002)
    pytest.fail("\n".join(found.said(i)[-3000:] for i in range(len(found.logs))))


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    processes.run(folder, 2, *LONG, "--run-dir", "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def stopped(folder) -> Path:
    """Two processes, of which the second got a SIGTERM in the middle of a save."""
    with processes.start(folder, 2, *LONG, "--run-dir", "stopped") as found:
        until_saving(folder / "stopped", 10, found)
        found.running[1].send_signal(signal.SIGTERM)
        codes = found.wait()
    assert codes == [130, 130], "\n".join(found.said(i)[-3000:] for i in range(2))
    assert "SIGTERM to one of 2 processes: saved at step " in found.said(0)
    assert found.said(1) == ""
    return folder / "stopped"


def last_saved(run: Path) -> int:
    return max(int(path.parent.name) for path in run.glob("stages/pretrain/checkpoints/*/manifest.json"))


def test_a_signal_to_one_stops_all_at_one_saved_step(stopped):
    steps = [line["step"] for line in metrics(stopped, "pretrain")]
    assert steps == list(range(1, last_saved(stopped) + 1)) and 10 < steps[-1] < STEPS


@pytest.mark.parametrize("count", [2, 1, 4])
def test_what_two_saved_any_number_goes_on_from(folder, undisturbed, stopped, count):
    again = shutil.copytree(stopped, folder / f"again{count}")
    processes.run(folder, count, *LONG, "--run-dir", again.name)
    assert [line["step"] for line in metrics(again, "pretrain")] == list(range(1, STEPS + 1))
    whole, pieces = (load_run(path, "pretrain").model for path in (undisturbed, again))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        if count == 2:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    summary = read_json(again / "stages" / "pretrain" / "summary.json")
    assert summary["lost_seconds"] > 0 and summary["start_seconds"] > 0


def test_a_step_that_does_not_come_ends_the_process_with_its_stacks(folder, undisturbed):
    with processes.start(folder, 2, *LONG, "--run-dir", "stuck", "--watchdog", "12") as found:
        until_saving(folder / "stuck", 10, found)
        found.running[1].send_signal(signal.SIGSTOP)
        assert found.running[0].wait(processes.PATIENCE) == 75
    said = found.said(0)
    assert "process 0 of 2 waited 12 seconds for step " in said and " of stage pretrain (--watchdog)" in said
    assert "most recent call first" in said and "lm/train/loop.py" in said


def test_processes_that_disagree_show_both_and_stop(folder):
    found = processes.run(
        folder, 2, *LM, "--run-dir", "torn", own={0: ("--sft.steps", "4"), 1: ("--sft.steps", "5")}, code=2
    )
    for i in range(2):
        said = found.said(i)
        assert said.startswith("lm: error: processes disagree about the experiment: process 0 has ")
        assert "process 1 has " in said and "(stages.sft.steps: 4 and 5)" in said and said.count("\n") == 1
    assert not (folder / "torn").exists()


def test_a_folder_that_is_not_shared_is_said(folder):
    own = {0: ("--run-dir", "here"), 1: ("--run-dir", "there")}
    found = processes.run(folder, 2, *LM, own=own, code=2)
    for i in range(2):
        assert "is not shared between the hosts: process 1 on " in found.said(i) and found.said(i).count("\n") == 1


@pytest.mark.parametrize("process", [0, 1])
def test_a_coordinator_that_cannot_be_reached_is_one_line(folder, process):
    where = ("--coordinator", "localhost:9", "--num-processes", "2", "--process-id", str(process))
    if process == 0:  # it listens itself, and nobody comes
        where = ("--coordinator", "localhost:18476", *where[2:])
    found = processes.run(folder, 1, *LM, *where, "--join-timeout", "2", code=2)
    said = found.said(0).splitlines()[-1]
    assert said.startswith(f"lm: error: {where[1]}") and "within 2 seconds" in said
