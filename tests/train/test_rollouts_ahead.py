"""Rollouts that are sampled while a step trains: which weights sample them, and that a run that was stopped goes on to the bit."""

import dataclasses
import io
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.check import check
from lm.experiment import GRPO, PPO, Distill, Experiment, Mesh, Model, RolloutMesh, Source, Stage, Tokenizer, UserError
from lm.parallel.mesh import check_split
from lm.rollout.episodes import Sampled
from lm.train.loaded_run import load_run
from lm.train.loop import Interrupted
from lm.train.rollout_log import AHEAD, decode, encode, read, write
from lm.train.rollouts_ahead import RolloutsAhead
from lm.train.signals import Stop
from lm.train.stages import run
from lm.train.trajectory_files import read_trajectories, step_of, trajectory_files
from tests.train.runs import CONSTANT, metrics, write_questions
from tests.train.test_trajectory_files import rollout

OBJECTIVES = {
    "grpo": GRPO("style", group_size=2, max_new_tokens=4, tis_clip=2.0, max_staleness=2),
    "ppo": PPO(verifier="style", max_new_tokens=4, max_staleness=2),
    "distill": Distill(teacher_prompt="{prompt} {answer}", max_new_tokens=4, on_policy=0.7, max_staleness=2),
}


def experiment(root: Path, objective, **changes) -> Experiment:
    few = {"steps": 6, "save_every": 2, "batch_size": 4, "seq_len": 48} | changes
    return Experiment(
        name="ahead",
        prompts=(),
        tokenizer=Tokenizer(vocab_size=320),
        model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=64),
        mesh=Mesh(data=1),
        stages=(Stage("reason", objective, (Source(str(root / "asked.jsonl"), holdout=0.2),), CONSTANT, **few),),
    )


def trajectories(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in trajectory_files(run_dir / "stages/reason")}


def test_a_rollout_is_the_same_after_it_was_logged():
    given = rollout(text="\ud800 ☃").trajectories
    said = {"role": "tool", "content": "?", "author": "environment", "error": True, "tool_calls": [{"name": "calc"}]}
    given[0] = dataclasses.replace(
        given[0], messages=(*given[0].messages, said), reward=0.1, rewards={"b": 0.1, "a": 0}
    )
    found, numbers = decode(encode(Sampled(given, 3), {"sampler_gap_mean": 0.1 + 0.2}))
    assert found.timeouts == 3 and numbers == {"sampler_gap_mean": 0.1 + 0.2}
    for one, other in zip(given, found.trajectories, strict=True):
        for name in ("tokens", "authors", "logp"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype
        for name in ("messages", "finish", "version", "reward"):
            assert getattr(one, name) == getattr(other, name)
        assert list(one.rewards.items()) == list(other.rewards.items())
    assert decode(encode(Sampled([], 0), {})) == (Sampled([], 0), {})


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.drop_columns(["logp"]),
        lambda t: t.set_column(0, "task", pa.array(["5"] * 4)),
        lambda t: t.set_column(1, "messages", pa.array(['[{"role": "user"}]'] * 4)),
        lambda t: t.set_column(1, "messages", pa.array(["[" * 9] * 4)),
        lambda t: t.replace_schema_metadata({}),
        lambda t: t.replace_schema_metadata({**t.schema.metadata, b"metrics": b"[]"}),
        lambda t: t.replace_schema_metadata({**t.schema.metadata, b"timeouts": b"many"}),
    ],
)
def test_a_log_of_another_program_is_told_in_a_line_whatever_its_seal(tmp_path, change):
    sink = io.BytesIO()
    whole = encode(Sampled(rollout().trajectories, 0), {"sampler_gap_mean": 0.5})
    assert list(read(tmp_path, [write(tmp_path, 1, whole)])) == [1]
    pq.write_table(change(pq.read_table(io.BytesIO(whole))), sink)
    name = write(tmp_path, 1, sink.getvalue())
    with pytest.raises(UserError, match=rf"{name} is damaged: it holds no rollout .*cannot be resumed") as told:
        read(tmp_path, [name])
    assert "\n" not in str(told.value)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    root = tmp_path_factory.mktemp("asked")
    write_questions(root)
    return root


@pytest.fixture(scope="module", params=OBJECTIVES)
def whole(request, asked, tmp_path_factory):
    """An experiment and the folder of its undisturbed run."""
    value = experiment(asked, OBJECTIVES[request.param])
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    run(value, folder)
    return value, folder


def killed_at(monkeypatch, number: int) -> None:
    """End the run in step `number` (from 1), when its updates were dispatched and a later rollout is in the log."""

    def sample_next(self, step):
        known(self, step)
        if step == number - 1:
            raise Killed

    known = RolloutsAhead.sample_next
    monkeypatch.setattr(RolloutsAhead, "sample_next", sample_next)


def same(value: Experiment, one: Path, other: Path) -> None:
    assert metrics(one, "reason") == metrics(other, "reason")
    assert trajectories(one) == trajectories(other) and trajectories(one)
    models = [load_run(folder, "reason").model for folder in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_each_step_trains_on_samples_of_the_weights_two_steps_ago(whole):
    _, folder = whole
    lines = [line for line in metrics(folder, "reason") if "staleness" in line]  # others sampled nothing
    versions = {
        row["step"]: row["version"]
        for path in trajectory_files(folder / "stages/reason")
        for row in read_trajectories(path)
    }
    assert len(lines) >= 3 and versions == {line["step"]: max(0, line["step"] - 3) for line in lines}
    for line in lines:
        assert line["staleness"] == min(2, line["step"] - 1)
        assert (line["log_ratio_max"] > 1e-5) == (line["step"] > 1)
        assert line["sampler_gap_max"] < 1e-4  # of the weights that sampled
    assert not (folder / "stages/reason" / AHEAD).exists()  # a finished stage needs none


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_bit(whole, tmp_path, monkeypatch):
    value, folder = whole
    for step in (1, 4, 5, 6):  # before the first checkpoint, with that of step 2, and twice with that of step 4
        with monkeypatch.context() as patch:
            killed_at(patch, step)
            with pytest.raises(Killed):
                run(value, tmp_path / "run")
        logged = {step_of(path) for path in (tmp_path / "run/stages/reason" / AHEAD).iterdir()}
        assert logged >= {min(step + later, 6) for later in (1, 2)}
    run(value, tmp_path / "run")
    same(value, folder, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_in_a_rollout_saves_the_step_that_trains_meanwhile(whole, tmp_path, monkeypatch):
    (value, folder), arrived, sample_next = whole, [], RolloutsAhead.sample_next

    def late(self, step):
        arrived.extend([step] if step == 2 else [])
        sample_next(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutsAhead, "sample_next", late)
        patch.setattr(Stop, "now", lambda self: "SIGTERM" if arrived else None)
        with pytest.raises(Interrupted, match="SIGTERM: saved at step 3 of 6 of stage reason"):
            run(value, tmp_path / "run")
    run(value, tmp_path / "run")
    same(value, folder, tmp_path / "run")


@pytest.fixture(scope="module")
def broken(asked, tmp_path_factory):
    """A run that was killed in step 5, after the checkpoints of steps 2 and 4."""
    value = experiment(asked, OBJECTIVES["grpo"])
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 5)
        with pytest.raises(Killed):
            run(value, folder)
    return value, folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bit", "gone"])
def test_a_rollout_that_a_checkpoint_needs_and_that_is_damaged_stops_the_run_in_a_line(broken, tmp_path, damage):
    value, folder = broken
    shutil.copytree(folder, tmp_path / "run")
    stage = tmp_path / "run/stages/reason"
    (needed,) = [path for path in (stage / AHEAD).iterdir() if step_of(path) == 6]
    content = bytearray(needed.read_bytes())
    content[len(content) // 2] ^= 1
    needed.write_bytes(content)
    if damage == "gone":
        needed.unlink()
    with pytest.raises(UserError, match=f"{needed.name} .*: the checkpoint cannot be resumed without it") as told:
        run(value, tmp_path / "run")
    assert "\n" not in str(told.value)
    shutil.rmtree(stage / "checkpoints/00000004")  # as the line says: the checkpoint before it has its own rollouts
    run(value, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run", "reason")] == list(range(1, 7))


def test_a_staleness_that_the_stage_is_too_short_for_is_refused(asked):
    with pytest.raises(UserError, match=r"reason\.objective\.max_staleness is 6 .* at most 5, or steps at least 7"):
        check(experiment(asked, dataclasses.replace(OBJECTIVES["grpo"], max_staleness=6)))


def test_without_staleness_nothing_is_logged_ahead(asked, tmp_path):
    o = dataclasses.replace(OBJECTIVES["grpo"], max_staleness=0)
    run(experiment(asked, o, steps=1), tmp_path / "run")
    assert not (tmp_path / "run/stages/reason" / AHEAD).exists()
    assert "staleness" not in metrics(tmp_path / "run", "reason")[0]


@pytest.mark.slow
def test_a_sampler_on_devices_of_its_own_gives_the_same_run(whole, tmp_path):
    value, folder = whole
    run(dataclasses.replace(value, rollout_mesh=RolloutMesh(devices=1)), tmp_path / "run")
    same(value, folder, tmp_path / "run")


def test_a_mesh_that_cannot_be_split_is_refused_with_the_sizes_that_can(asked):
    value = experiment(asked, OBJECTIVES["grpo"], batch_size=6)  # 12 rows
    value = dataclasses.replace(value, mesh=Mesh(), rollout_mesh=RolloutMesh(devices=5))
    with pytest.raises(
        UserError, match=r"rollout_mesh\.devices is 5 of 8 devices: reason: 12 rows in a .* 5; it can be 2, 4, 6$"
    ):
        check_split(value, 8)
    with pytest.raises(UserError, match="none is left for training"):
        check_split(dataclasses.replace(value, rollout_mesh=RolloutMesh(devices=8)), 8)
    idle = dataclasses.replace(OBJECTIVES["grpo"], max_staleness=0)
    with pytest.raises(UserError, match=r"devices is 1 and no stage has objective\.max_staleness"):
        check_split(dataclasses.replace(experiment(asked, idle), rollout_mesh=RolloutMesh(devices=1)), 8)
