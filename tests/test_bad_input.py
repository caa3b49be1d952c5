"""What a user can get wrong gives one clear line and exit code 2, before anything compiles where that can be."""

import gzip
import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.cli.main import main
from lm.config.field import LONGEST_LINE, LONGEST_VALUE
from lm.experiment import UserError
from lm.train.loaded_run import load_run
from lm.train.metrics import read_lines
from lm.train.run_folder import RunFolder

EXPERIMENT = """
from lm.experiment import DPO, GRPO, SFT, Experiment, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

fast = Optimizer(peak_lr=1e-3, warmup_steps=2)
experiment = Experiment(
    name="bad",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=384),
    model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=64),
    stages=(
        Stage("pretrain", Pretrain(), (Source("text.txt", holdout=0.2),), fast, 4, 8, 32, save_every=2),
        Stage("sft", SFT(), (Source("chat.jsonl", holdout=0.2),), fast, 2, 8, 64),
    ),
)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(EXPERIMENT)
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (6000, 5))
    words = np.array(["".join(word) for word in letters]).reshape(-1, 50)
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(line) for line in words))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
    rows = [json.dumps({"messages": turns, "key": str(i)}) for i in range(50)]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line that the command says before it exits with 2."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("lm: error: ") and len(said.splitlines()) == 1, said
    return said


def run(*overrides: str) -> tuple[str, ...]:
    return ("run", "bad.py", "--run-dir", "out", *overrides)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["--sft.stepz", "3"], ["--sft.stepz", "sft.steps"]),
        (["--sft.steps", "three"], ["--sft.steps", "'three'", "an integer"]),
        (["--pretrain.sources.0.path", "txet.txt"], ["txet.txt", "text.txt"]),
        (["--pretrain.sources.0.path", "gen:dcos"], ["gen:dcos", "gen:docs"]),
        (["--tokenizer.path", "text.txt"], ["tokenizer.path", "text.txt is not a sentencepiece model", "tokenizer.json"]),
        (["--pretrain.batch_size", "6"], ["pretrain.batch_size 6", "mesh.data 8"]),
        (["--mesh.data", "64"], ["64 devices", "there are"]),
        (["--tokenizer.vocab_size", "100"], ["tokenizer.vocab_size", "100", "at least 262"]),
        (["--model.num_kv_heads", "4"], ["num_heads is 2", "num_kv_heads, 4"]),
        (["--sft.seq_len", "65"], ["sft.seq_len is 65", "model.max_len 64"]),
        (["--until", "stf"], ["stf", "pretrain, sft"]),
        (["--name", ""], ["name is ''", "letters a to z"]),
        (["--pretrain.optimizer.clip_norm", "-1"], ["pretrain.optimizer.clip_norm is -1.0", "from 1e-06"]),
        (["--pretrain.optimizer.warmup_steps", "100"], ["warmup_steps is 100; it should be from 0 to 4"]),
        (["--pretrain.batch_size", "16777216"], ["pretrain needs at least", "rows of 32 tokens"]),
        (["--run-dir", "text.txt/x"], ["'text.txt/x' cannot be made", "--run-dir DIR"]),
        (["--cache", "text.txt"], ["'text.txt' cannot be made", "--cache DIR"]),
    ],
)  # fmt: skip
def test_a_wrong_run_is_refused(work, capsys, overrides, words):
    said = refused(capsys, *run(*overrides))
    for word in words:
        assert word in said, said
    assert not (work / "out" / "stages").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"messages": []}\n{"messages": [', ["chat.jsonl line 2"]),
        ('{"conversation": 1, "id": 2}\n' * 9, ["messages", "conversation, id"]),
        ("[1, 2]\n", ["chat.jsonl line 1", "a JSON object"]),
        ("", ["chat.jsonl", "empty"]),
        (
            json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}) + "\n",
            ["chat.jsonl line 1, turn 2", "two user turns in a row"],
        ),
    ],
)  # fmt: skip
def test_broken_rows_are_named_before_anything_is_trained(work, capsys, content, words):
    (work / "chat.jsonl").write_text(content)
    said = refused(capsys, *run())
    for word in words:
        assert word in said, said
    assert not (work / "out" / "stages").exists()


@pytest.mark.slow
def test_what_was_mended_runs_in_the_same_folder(work, capsys):
    refused(capsys, *run("--tokenizer.vocab_size", "100"))
    assert main(list(run("--until", "pretrain", "--pretrain.steps", "2"))) == 0


def test_a_cut_gzip_is_named(work, capsys):
    (work / "chat.jsonl.gz").write_bytes(gzip.compress((work / "chat.jsonl").read_bytes())[:-20])
    assert "chat.jsonl.gz" in refused(capsys, *run("--sft.sources.0.path", "chat.jsonl.gz"))


def test_a_prompt_longer_than_the_context_is_named(work, capsys):
    rows = [json.dumps({"question": "cat " * 90, "answer": "1", "key": str(i)}) for i in range(9)]
    (work / "long.jsonl").write_text("\n".join(rows))
    (work / "bad.py").write_text(EXPERIMENT.replace("SFT()", "GRPO(group_size=2, max_new_tokens=8)"))
    said = refused(capsys, *run("--sft.sources.0.path", "long.jsonl"))
    assert "long.jsonl line" in said and "raise seq_len by" in said, said
    assert not (work / "out" / "stages").exists()


@pytest.mark.parametrize(
    "item, words",
    [
        ('Eval("chat", Source("chat.jsonl", holdout=0.2), verifier="math")', ["evals.chat.verifier", "'math'", "answer"]),
        ('Eval("chat", Source("chat.jsonl", holdout=0.3))', ["chat.jsonl", "holdout 0.3", "evaluation chat"]),
        ('Eval("chat", Source("none.jsonl"))', ["none.jsonl", "--evals.chat.source.path"]),
    ],
)  # fmt: skip
def test_an_eval_that_cannot_be_taken_is_named(work, capsys, item, words):
    text = EXPERIMENT.replace("import DPO,", "import DPO, Eval,").replace("prompts=()", f"evals=({item},)")
    (work / "bad.py").write_text(text.replace("max_len=64", "max_len=128"))
    said = refused(capsys, *run())
    for word in words:
        assert word in said, said
    assert not (work / "out" / "stages").exists()


def finite(run_dir) -> bool:
    """Whether the run's last checkpoint loads, and is a model."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_run(run_dir).model))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(work, capsys):
    wild = ("--pretrain.optimizer.peak_lr", "1e3", "--pretrain.save_every", "1", "--until", "pretrain")
    said = refused(capsys, *run(*wild, "--pretrain.steps", "30", "--pretrain.optimizer.weight_decay", "1e3"))
    step = read_lines(work / "out" / "stages" / "pretrain" / "metrics.jsonl")[-1]["step"]
    assert f"at step {step};" in said and "last good checkpoint is kept" in said, said
    assert "pretrain.optimizer.peak_lr" in said
    assert RunFolder(work / "out").checkpoints("pretrain") / f"{step - 1:08d}" in list(
        RunFolder(work / "out").checkpoints("pretrain").iterdir()
    )
    assert finite(work / "out")


def test_a_second_process_in_the_folder_is_refused(work, capsys):
    with RunFolder(work / "out").lock():
        said = refused(capsys, *run())
    assert f"in use by process {os.getpid()}" in said and "--run-dir DIR" in said


@pytest.mark.slow
def test_a_full_disk_stops_and_the_same_command_goes_on_when_there_is_room(work, small_disk, capsys):
    big = ("--model.embed_dim", "128", "--model.mlp_dim", "160", "--pretrain.save_every", "1", "--until", "pretrain")
    command = ("run", "bad.py", "--run-dir", str(small_disk / "out"), *big)
    said = refused(capsys, *command)
    assert "could not be saved: No space left on device" in said and "the same command again" in said, said
    assert finite(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert main(list(command)) == 0
    assert [line["step"] for line in read_lines(small_disk / "out/stages/pretrain/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_disk_that_may_not_be_written_is_named(work, small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = refused(capsys, "run", "bad.py", "--run-dir", str(small_disk / "out"))
    assert f"{small_disk / 'out'}' cannot be made: Read-only file system" in said


def flip_a_bit(checkpoint) -> str:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    return f"{largest.name} does not match its checksum"


def cut_it_short(checkpoint) -> str:
    (checkpoint / "manifest.json").unlink()
    return f"{checkpoint.name}"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, cut_it_short])
def test_a_finished_stage_is_read_at_its_last_step_and_another_at_its_newest(work, capsys, damage):
    assert main(list(run("--until", "pretrain", "--pretrain.save_every", "1"))) == 0
    told = damage(RunFolder(work / "out").checkpoints("pretrain") / "00000004")
    sample = ("sample", "out", "--prompt", "the", "--max-new-tokens", "2")
    said = refused(capsys, *sample)
    assert told in said and "last checkpoint of a finished stage" in said and "trains that stage again" in said
    assert told in refused(capsys, "run", "bad.py", "--run-dir", "out", "--pretrain.save_every", "1")
    RunFolder(work / "out").summary("pretrain").unlink()  # as if it had been killed before its end
    if damage is flip_a_bit:
        assert told in (said := refused(capsys, *sample)) and "to read the checkpoint before it" in said
        shutil.rmtree(RunFolder(work / "out").checkpoints("pretrain") / "00000004")
    assert main(list(sample)) == 0
    assert ("00000004 was not finished when its run stopped: skipped" in capsys.readouterr().out) == (
        damage is cut_it_short
    )
    assert "leaves 62: shorten it" in refused(capsys, "sample", "out", "--prompt", "the " * 90, "--max-new-tokens", "2")


def test_a_folder_that_is_no_run_and_an_unknown_command(work, capsys):
    assert "nowhere" in refused(capsys, "report", "nowhere")
    assert "did you mean run?" in refused(capsys, "rnu", "bad.py")


LONG_WORDS = [
    "a" * 5000,
    "a b " * 2000,
    "/x" * 2500,
    "--" + "a" * 5000,
    "'" * 5000,
    "\"'" * 3000,
    "a\nb" * 1500,
    "\\" * 4001,
]


@pytest.mark.parametrize("word", LONG_WORDS, ids=lambda word: repr(word[:6]))
def test_an_error_repeats_no_more_than_the_beginning_of_a_long_value(work, capsys, word):
    for arguments in (
        ["run", word],
        ["compare", word],
        ["config", "bad.py", f"--{word}", "1"],
        ["config", "bad.py", f"--pretrain.steps={word}"],
        ["config", "bad.py", f"--pretrain.objective.preset={word}"],
        ["config", "bad.py", f"--model.pattern={word}"],
        ["run", "bad.py", f"--pretrain.sources.0.path={word}"],
        ["run", "bad.py", f"--name={word}"],
        ["sample", f"none{word}"],
        [word],
    ):
        assert len(refused(capsys, *arguments)) < 700


@given(st.text(max_size=700), st.text(max_size=700))
def test_every_error_is_one_line_that_can_be_printed(value, other):
    said = str(UserError(f"it is {value!r}; {other}"))
    assert said.isprintable() and len(said) <= LONGEST_LINE + 1
    short = repr(value)[1:-1][:LONGEST_VALUE]
    assert short in said
