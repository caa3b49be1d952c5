"""Distillation in a run: teachers of this run, of another and open weights; privileged prompts; answers of the data; resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lm.check import check
from lm.cli.main import main
from lm.data.tokenizer import SubwordTokenizer
from lm.data.vocabulary import load_tokenizer
from lm.experiment import SFT, Distill, Experiment, Mesh, Model, Source, Stage, Tokenizer, UserError, from_dict
from lm.train.stages import run
from lm.train.teachers import check_teacher
from lm.train.trajectory_files import read_trajectories, trajectory_files
from tests.train.runs import CONSTANT, forget_last_checkpoint, metrics, write_questions

pytestmark = pytest.mark.slow

FEW = {"batch_size": 4, "seq_len": 48}
STEPS = 6


def small(
    root: Path, *distill: Stage, name: str = "small", width: int = 16, tokenizer: str | None = None
) -> Experiment:
    asked = Source(str(root / "asked.jsonl"), holdout=0.2)
    return Experiment(
        name=name,
        prompts=(),
        tokenizer=Tokenizer(vocab_size=320, path=tokenizer),
        model=Model(
            num_layers=1, embed_dim=width, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=64
        ),
        mesh=Mesh(data=1),
        stages=(Stage("sft", SFT(), (asked,), CONSTANT, **FEW, steps=4), *distill),
    )  # fmt: skip


def distilled(root: Path, name: str, **fields) -> Stage:
    asked = Source(str(root / "asked.jsonl"), holdout=0.2)
    objective = Distill(max_new_tokens=8, **fields)
    return Stage(name, objective, (asked,), CONSTANT, **FEW | {"steps": STEPS, "save_every": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A larger teacher in its own run, its export, and a student that is distilled from both and from itself with an answer."""
    root = tmp_path_factory.mktemp("distill")
    write_questions(root)
    run(small(root, name="teacher", width=32), root / "teacher")
    assert main(["export", str(root / "teacher"), str(root / "exported")]) == 0
    stages = (
        distilled(root, "mixed", teacher=f"{root / 'teacher'}:sft", on_policy=0.5, beta=0.0),
        distilled(root, "imported", teacher=f"hf:{root / 'exported'}", verifier="style"),
        distilled(root, "informed", teacher_prompt="{prompt} Say: {answer}", beta=1.0),
        distilled(root, "back", teacher="sft", on_policy=0.0),
    )
    run(small(root, *stages, tokenizer=str(root / "teacher" / "tokenizer")), root / "run")
    return root


STAGES = ["mixed", "imported", "informed", "back"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_student_differs_from_its_teacher_by_a_finite_divergence(folder, stage):
    losses = [line["loss"] for line in metrics(folder / "run", stage)]
    assert len(losses) == STEPS and all(np.isfinite(one) and one > 0 for one in losses)


@pytest.mark.parametrize("stage", ["imported", "back"])
def test_the_divergence_from_another_model_falls(folder, stage):
    lines = metrics(folder / "run", stage)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_samples_and_answers_of_the_data_alternate_by_chance(folder):
    sampled = ["completion_length" in line for line in metrics(folder / "run", "mixed")]
    assert 0 < sum(sampled) < STEPS
    assert not any("completion_length" in line for line in metrics(folder / "run", "back"))
    assert len(trajectory_files(folder / "run" / "stages" / "mixed")) == sum(sampled)
    assert all("reward" in line for line in metrics(folder / "run", "imported"))


@pytest.fixture(scope="module")
def resumed(folder) -> Path:
    copy = folder / "resumed"
    shutil.copytree(folder / "run", copy)
    for stage in STAGES:
        forget_last_checkpoint(copy, stage, 2)
    run(from_dict(json.loads((copy / "experiment.json").read_text())), copy)
    return copy


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_is_the_same_to_the_bit(folder, resumed, stage):
    assert metrics(resumed, stage) == metrics(folder / "run", stage)
    files = [trajectory_files(one / "stages" / stage) for one in (folder / "run", resumed)]
    assert [one.name for one in files[0]] == [one.name for one in files[1]]
    assert all(read_trajectories(one) for one in files[0])


@pytest.mark.parametrize(
    "teacher, told",
    [
        ("{root}/teacher:wanting", "the stages of .*teacher that train a language model are sft"),
        ("{root}/nowhere:sft", "nowhere is not the folder of a run"),
        ("{root}/teacher:sft", "whose vocabulary of 320 tokens is not that of this run, 300 tokens"),
        ("hf:{root}/exported", "whose vocabulary of 320 tokens is not that of this run, 300 tokens"),
        ("hf:{root}/nowhere", "nowhere"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told_before_training(folder, teacher, told):
    other = SubwordTokenizer.train(["Tell me and Gladly do, or tell no one"] * 9, 300)
    stage = distilled(folder, "distill", teacher=teacher.format(root=folder))
    with pytest.raises(UserError, match=told):
        check_teacher(stage, other, Model())


def test_a_teacher_with_a_shorter_context_is_told(folder):
    stage = dataclasses.replace(distilled(folder, "distill", teacher=f"{folder}/teacher:sft"), seq_len=96)
    with pytest.raises(UserError, match=r"whose context is 64 tokens: distill\.seq_len 96 should be at most that"):
        check_teacher(stage, load_tokenizer(folder / "teacher" / "tokenizer"), Model())


@pytest.mark.parametrize(
    "teacher, told", [("wanting", "are sft, and RUN:NAME"), ("sft", "starts from: leave teacher empty")]
)
def test_a_teacher_of_this_run_is_an_earlier_stage_and_not_the_student_itself(tmp_path, teacher, told):
    with pytest.raises(UserError, match=told):
        check(small(tmp_path, distilled(tmp_path, "distill", teacher=teacher)))
