"""What a user can get wrong gives one clear line and exit code 2, before anything compiles where that can be."""

import gzip
import json

import numpy as np
import pytest

from lm.cli.main import main

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
        (["--pretrain.batch_size", "6"], ["pretrain.batch_size 6", "mesh.data x mesh.fsdp"]),
        (["--mesh.data", "64"], ["64 devices", "there are"]),
        (["--tokenizer.vocab_size", "30000"], ["tokenizer.vocab_size", "30000"]),
        (["--model.num_kv_heads", "4"], ["num_heads 2", "num_kv_heads 4"]),
        (["--sft.seq_len", "65"], ["sft.seq_len 65", "model.max_len 64"]),
        (["--until", "stf"], ["stf", "pretrain, sft"]),
    ],
)  # fmt: skip
def test_a_wrong_run_is_refused(work, capsys, overrides, words):
    said = refused(capsys, *run(*overrides))
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"messages": []}\n{"messages": [', ["chat.jsonl", "2"]),
        ('{"conversation": 1, "id": 2}\n' * 9, ["messages", "conversation, id"]),
        ("", ["chat.jsonl", "empty"]),
        (
            json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}) + "\n",
            ["chat.jsonl", "1", "turn 2", "two user turns in a row"],
        ),
    ],
)  # fmt: skip
def test_broken_rows_are_named(work, capsys, content, words):
    (work / "chat.jsonl").write_text(content)
    said = refused(capsys, *run())
    for word in words:
        assert word in said, said


def test_a_cut_gzip_is_named(work, capsys):
    (work / "chat.jsonl.gz").write_bytes(gzip.compress((work / "chat.jsonl").read_bytes())[:-20])
    assert "chat.jsonl.gz" in refused(capsys, *run("--sft.sources.0.path", "chat.jsonl.gz"))


def test_a_prompt_longer_than_the_context_is_named(work, capsys):
    rows = [json.dumps({"question": "cat " * 90, "answer": "1", "key": str(i)}) for i in range(9)]
    (work / "long.jsonl").write_text("\n".join(rows))
    (work / "bad.py").write_text(EXPERIMENT.replace("SFT()", "GRPO(group_size=2, max_new_tokens=8)"))
    said = refused(capsys, *run("--sft.sources.0.path", "long.jsonl", "--until", "sft", "--pretrain.steps", "1"))
    assert "seq_len" in said and "longest" in said, said


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(work, capsys):
    wild = ("--pretrain.optimizer.peak_lr", "1e38", "--pretrain.save_every", "1", "--until", "pretrain")
    said = refused(capsys, *run(*wild, "--pretrain.steps", "30", "--pretrain.optimizer.clip_norm", "1e30"))
    assert "at step" in said and "last good checkpoint is kept" in said, said
    from lm.train.stages import load_run

    leaves = [np.asarray(x) for x in __import__("jax").tree.leaves(load_run(work / "out").model)]
    assert all(np.isfinite(x).all() for x in leaves)


def test_damaged_checkpoints_fall_back_and_say_so(work, capsys):
    assert main(list(run("--until", "pretrain", "--pretrain.save_every", "1"))) == 0
    folder = work / "out" / "stages" / "pretrain" / "checkpoints"
    newest = max(path for path in folder.iterdir() if path.name.isdigit())
    largest = max(
        (path for path in newest.rglob("*") if path.is_file() and path.name != "manifest.json"),
        key=lambda p: p.stat().st_size,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    capsys.readouterr()
    assert main(["sample", "out", "--prompt", "the", "--max-new-tokens", "2"]) == 0
    said = "".join(capsys.readouterr())
    assert "does not match its checksum" in said and "the checkpoint before it" in said


def test_a_folder_that_is_no_run_and_an_unknown_command(work, capsys):
    assert "nowhere" in refused(capsys, "report", "nowhere")
    assert main(["rnu", "bad.py"]) == 2
    assert "run" in capsys.readouterr().err
