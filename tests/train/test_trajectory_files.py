"""Trajectory files hold all that was sampled, keep to their limit, and are the same after a kill."""

import dataclasses
import io
import json
import random
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.algorithms.ppo import epoch_order, make_minibatches
from lm.experiment import GRPO, PPO, Experiment, Mesh, Model, Source, Stage, Tokenizer, UserError
from lm.rollout.trajectory import AUTHORS, Rollout, Trajectory
from lm.train.stages import run
from lm.train.trajectory_files import (
    FOLDER,
    KEPT,
    OPTIONAL,
    check_trajectories,
    keep_only,
    read_trajectories,
    rewind_trajectories,
    step_of,
    trajectory_files,
)
from lm.train.trajectory_writer import MEGABYTE, keep_trajectories, token_numbers
from lm.types import CriticBatch, array_fields
from lm.user_functions import SEARCH_PATH
from tests.helpers import tiny_stage
from tests.train.runs import forget_last_checkpoint, metrics

STAGE = tiny_stage(GRPO(group_size=2), trajectory_mb=1)


def rollout(size=20, seed=0, text="hello"):
    rng = np.random.default_rng(seed)
    messages = (
        {"role": "user", "content": text, "author": "prompt"},
        {"role": "assistant", "content": "a", "author": "model"},
    )
    found = [
        Trajectory(
            {"question": text, "n": np.float32(2)}, messages, rng.integers(0, 2**30, size, np.int32),
            np.array([0] * 4 + [1] * (size - 4), np.int8), rng.normal(size=size).astype(np.float32), "stop", 3,
            {"answer": 1.0}, 1.0,
        )
        for _ in range(4)
    ]  # fmt: skip
    return Rollout([], found, np.arange(4, dtype=np.float32), np.array([2, 3]), {})


def test_what_is_read_is_what_was_sampled(tmp_path):
    one = rollout(text="\ud800 <b> ☃")
    assert keep_trajectories(tmp_path, STAGE, 5, one) == {}
    (path,) = trajectory_files(tmp_path)
    rows = read_trajectories(path)
    assert step_of(path) == 5 and [row["group"] for row in rows] == [0, 0, 1, 1]
    assert [row["trained"] for row in rows] == [False, False, True, True]
    for row, given, advantage in zip(rows, one.trajectories, one.advantages, strict=True):
        for name in ("tokens", "authors", "logp"):
            np.testing.assert_array_equal(np.array(row[name], getattr(given, name).dtype), getattr(given, name))
        assert (row["rewards"], row["reward"], row["advantage"]) == ([("answer", 1.0)], 1.0, advantage)
        assert (row["step"], row["version"], row["finish"]) == (5, 3, "stop")
        assert row["messages"][0] == {"role": "user", "content": "? <b> ☃", "author": "prompt"}
        assert json.loads(row["task"])["n"] == 2
    assert pq.read_schema(path).metadata[b"authors"].decode() == ", ".join(f"{n} {a}" for n, a in enumerate(AUTHORS))
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


def test_the_newest_files_within_the_limit_are_kept(tmp_path):
    for step in range(1, 8):
        assert keep_trajectories(tmp_path, STAGE, step, rollout(10_000, seed=step)) == {}
    kept = trajectory_files(tmp_path)
    sizes = [path.stat().st_size for path in kept]
    assert sum(sizes) <= MEGABYTE < sum(sizes) + sizes[0]
    assert [step_of(path) for path in kept] == list(range(8 - len(kept), 8))
    assert keep_trajectories(tmp_path, dataclasses.replace(STAGE, trajectory_mb=0), 8, rollout()) == {}
    assert trajectory_files(tmp_path) == kept
    told = keep_trajectories(tmp_path, STAGE, 8, rollout(100_000))
    assert "trajectory_mb 1" in told["trajectories"] and not trajectory_files(tmp_path)


def test_a_damaged_file_is_told_in_a_line(tmp_path):
    keep_trajectories(tmp_path, STAGE, 1, rollout())
    check_trajectories(tmp_path)
    (path,) = trajectory_files(tmp_path)
    content = bytearray(path.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            check_trajectories(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        read_trajectories(path)


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_file_that_a_stage_kept_and_lost_is_told_in_a_line(tmp_path, place):
    for step in (2, 4, 6):  # a stage may sample in some steps only
        keep_trajectories(tmp_path, STAGE, step, rollout())
    check_trajectories(tmp_path)
    lost = trajectory_files(tmp_path)[place]
    lost.unlink()
    with pytest.raises(UserError, match=f"has 2 of the 3 trajectory files that the stage kept, and lacks {lost.name}"):
        check_trajectories(tmp_path)
    record = tmp_path / FOLDER / KEPT
    whole = record.read_bytes()
    record.unlink()
    check_trajectories(tmp_path)  # of an older lm
    record.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=f"{KEPT} is not valid JSON"):
        check_trajectories(tmp_path)
    shutil.rmtree(tmp_path / FOLDER)
    check_trajectories(tmp_path)


def test_a_folder_of_trajectories_is_read_as_one_table(tmp_path):
    for step in (1, 2):
        keep_trajectories(tmp_path, STAGE, step, rollout())
    assert set(pq.read_table(tmp_path / FOLDER)["step"].to_pylist()) == {1, 2}


def test_bytes_that_are_no_trajectories_are_told_in_a_line(tmp_path):
    keep_trajectories(tmp_path, STAGE, 1, rollout())
    (path,) = trajectory_files(tmp_path)
    whole, draw = path.read_bytes(), random.Random(0)
    path.unlink()
    for number in range(300):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        if number % 3 == 0:
            del content[draw.randrange(len(content)) :]
        named = path.with_name(f"step-00000001-{zlib.crc32(content):08x}.parquet")
        named.write_bytes(content)
        try:
            read_trajectories(named)
        except UserError as error:
            assert named.name in str(error)
        named.unlink()


def replaced(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.drop_columns(["rewards"]), "0 columns rewards"),
        (lambda t: t.append_column("task", t["task"]), "2 columns task"),
        (lambda t: replaced(t, "reward", ["much"] * 4), "much"),
        (lambda t: replaced(t, "reward", [None] * 4), "reward has nulls"),
        (lambda t: replaced(t, "group", [0.5] * 4), "0.5"),
        (lambda t: replaced(t, "group", [-1] * 4), "group is negative"),
        (lambda t: replaced(t, "step", [2] * 4), "another step than its name"),
        (lambda t: replaced(t, "messages", [[{"role": "user", "content": None, "author": "prompt"}]] * 4), "messages has nulls"),
        (lambda t: replaced(t, "messages", [5] * 4), "messages|Unsupported cast|cast"),
        (lambda t: replaced(t, "tokens", [[1, None]] * 4), "tokens has nulls"),
        (lambda t: replaced(t, "tokens", [[-1] * 20] * 4), "tokens is negative"),
        (lambda t: replaced(t, "logp", [[0.5]] * 4), "logp are not one for each token"),
        (lambda t: replaced(t, "trainer_logp", [None, [0.5] * 20, [0.5] * 20, [0.5] * 19]), "trainer_logp are not one for each token"),
    ],
)  # fmt: skip
def test_a_file_of_another_program_is_told_in_a_line_whatever_its_seal(tmp_path, change, told):
    keep_trajectories(tmp_path, STAGE, 1, rollout())
    (path,) = trajectory_files(tmp_path)
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(path)), sink)
    path.unlink()
    forged = path.with_name(f"step-00000001-{zlib.crc32(sink.getvalue()):08x}.parquet")
    forged.write_bytes(sink.getvalue())
    with pytest.raises(UserError, match=told) as caught:
        read_trajectories(forged)
    assert forged.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_an_older_version_is_read_without_the_newer_columns(tmp_path):
    keep_trajectories(tmp_path, STAGE, 1, rollout())
    (path,) = trajectory_files(tmp_path)
    sink = io.BytesIO()
    pq.write_table(pq.read_table(path).drop_columns([*OPTIONAL]), sink)
    older = path.with_name(f"step-00000001-{zlib.crc32(sink.getvalue()):08x}.parquet")
    older.write_bytes(sink.getvalue())
    rows = [{name: row[name] for name in row if name not in OPTIONAL} for row in read_trajectories(path)]
    assert read_trajectories(older) == [row | dict.fromkeys(OPTIONAL) for row in rows]


@pytest.mark.parametrize("name", ["step-x-1a2b3c4d.parquet", "step-00000001.parquet", "step-1-00000000.parquet"])
def test_a_file_of_another_name_is_told_in_a_line(tmp_path, name):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / name).write_bytes(b"")
    for act in (check_trajectories, lambda folder: rewind_trajectories(folder, 3)):
        with pytest.raises(UserError, match=f"{name} has a name that no trajectory file has"):
            act(tmp_path)


def test_later_steps_and_drafts_go_when_a_stage_goes_on(tmp_path):
    for step in (1, 2, 3):
        keep_trajectories(tmp_path, STAGE, step, rollout())
    (tmp_path / "trajectories" / "step-00000004-00000000.parquet.tmp").write_text("half")
    rewind_trajectories(tmp_path, 2)
    assert [step_of(path) for path in trajectory_files(tmp_path)] == [1, 2]
    assert not [*(tmp_path / FOLDER).glob("*.tmp")]
    check_trajectories(tmp_path)


GUESS = """
class Guess:
    columns = ("secret",)

    def reset(self, task):
        self.secret, self.guesses = str(task["secret"]), []
        return [{"role": "user", "content": "Guess."}]

    def step(self, completion):
        self.guesses.append(completion)
        return [{"role": "user", "content": "higher"}] if len(self.guesses) < 2 else None

    def reward(self):
        return {"short": 1 / (1 + len("".join(self.guesses))), "turns": float(len(self.guesses))}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of GRPO on an environment of two turns from a file of the user's own."""
    folder = tmp_path_factory.mktemp("guess")
    (folder / "guess.py").write_text(GUESS)
    rows = [{"text": "Guess higher.", "secret": n, "key": f"secret {n}"} for n in range(20)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SEARCH_PATH, str(folder))
        run(guessing(folder), folder / "run")
    return folder


def guessing(folder: Path) -> Experiment:
    objective = GRPO(environment="guess:Guess", group_size=4, max_new_tokens=46, kl_coef=0.1, updates_per_rollout=2)
    return Experiment(
        name="guess",
        prompts=(),
        tokenizer=Tokenizer(vocab_size=264),
        model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=96),
        mesh=Mesh(data=1),
        stages=(
            Stage("grpo", objective, (Source(str(folder / "asked.jsonl"), holdout=0.0),), steps=4, batch_size=4, seq_len=72, save_every=2),
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_two_turns_are_trained_on_and_written(finished):
    files = trajectory_files(finished / "run" / "stages" / "grpo")
    rows = [row for path in files for row in read_trajectories(path)]
    assert [step_of(path) for path in files] == [1, 2, 3, 4] and len(rows) == 4 * 16
    assert {row["version"] for row in rows} == {0, 1, 2, 3}
    two = [row for row in rows if 2 in row["authors"]]
    assert two and all(len(row["messages"]) == 4 for row in two)
    lines = metrics(finished / "run", "grpo")
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    # Float32: what the sampler said over both turns is what the trainer computes.
    assert max(line["sampler_gap_max"] for line in lines) < 1e-4
    assert max(row["largest_gap"] for row in rows) < 1e-4, "a row has the trainer's numbers of its own tokens"
    for row in rows[:16]:  # the first step's policy is the reference
        np.testing.assert_allclose(row["ref_logp"], row["trainer_logp"], atol=1e-4)
        assert row["token_advantages"] is None and row["sampled"] == np.sum(np.array(row["authors"]) == 1)
    sampled = np.mean([np.sum(np.array(row["authors"]) == 1) for row in rows[:16]])
    assert lines[0]["completion_length"] == pytest.approx(sampled)
    assert lines[0]["reward"] == pytest.approx(np.mean([row["reward"] for row in rows[:16]]))


def test_the_numbers_of_shuffled_minibatches_are_their_rows_own():
    o, key, size = PPO(minibatches=2, epochs=2), jax.random.key(1), 6
    values = np.tile(np.arange(size, dtype=np.float32)[:, None], (1, 4))
    real = np.triu(np.ones((size, 4), np.int32))  # so that rows have 4, 3, 2, 1, 0 and 0 tokens
    fields = dict.fromkeys(array_fields(CriticBatch), values) | {"segments": real}
    once = make_minibatches(CriticBatch(**fields), o, key)[: o.updates_per_epoch]
    found = token_numbers(epoch_order(key, 0, size), once, {"trainer_logp": [batch.old_logp for batch in once]})
    for trajectory in range(size):
        assert found[trajectory]["trainer_logp"].tolist() == [trajectory] * max(0, 4 - trajectory)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_files(finished, monkeypatch):
    """Their names have their checksums."""
    monkeypatch.setenv(SEARCH_PATH, str(finished))
    folder = finished / "run" / "stages" / "grpo"
    before, lines = trajectory_files(folder), metrics(finished / "run", "grpo")
    forget_last_checkpoint(finished / "run", "grpo", 2)
    keep_only(folder, before[:-1])
    run(guessing(finished), finished / "run")
    assert trajectory_files(folder) == before and metrics(finished / "run", "grpo") == lines


@pytest.mark.slow
def test_a_damaged_file_ends_a_resume_before_it_trains(finished, monkeypatch):
    monkeypatch.setenv(SEARCH_PATH, str(finished))
    path = trajectory_files(finished / "run" / "stages" / "grpo")[0]
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"step-00000001-.* is damaged"):
        run(guessing(finished), finished / "run")
    path.write_bytes(content)
