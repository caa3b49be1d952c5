"""All four stages through the `lm` command: killed in the middle of each, resumed, and equal to the bit in the end."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lm
from lm.cli.main import main
from lm.experiment import UserError
from lm.train.goodput import PARTS
from lm.train.loaded_run import load_run
from lm.train.metrics import read_lines

pytestmark = pytest.mark.slow

EXPERIMENT = """
from lm.experiment import DPO, GRPO, SFT, Eval, Experiment, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

fast = Optimizer(peak_lr=1e-3, warmup_steps=2)
often = {"optimizer": fast, "steps": 12, "batch_size": 4, "save_every": 3, "eval_every": 5, "evals": ("instruct",)}
text = Source("text.txt", holdout=0.2)
instruct = Source("gen:instruct", holdout=0.5)
arithmetic = Source("gen:arithmetic", holdout=0.5)
preferences = Source("gen:preferences", holdout=0.5)
experiment = Experiment(
    name="smoke",
    tokenizer=Tokenizer(vocab_size=512),
    model=Model(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64, max_len=128),
    stages=(
        Stage("pretrain", Pretrain(z_loss=1e-4), (text,), seq_len=64, microbatches=2, **often),
        Stage("sft", SFT(), (instruct, arithmetic), seq_len=64, **often | {"optimizer": Optimizer(kind="muon", warmup_steps=2)}),
        Stage("preference", DPO(), (preferences,), seq_len=128, **often),
        Stage(
            "reason",
            GRPO(group_size=4, max_new_tokens=8, updates_per_rollout=2, kl_coef=0.1),
            (arithmetic,),
            seq_len=80,
            **often,
        ),
    ),
    evals=(
        Eval("text", text, "bits_per_byte", count=4),
        Eval("instruct", instruct, count=8, max_new_tokens=8, temperature=1.0),
        Eval("pairs", preferences, "pair_accuracy", count=8),
    ),
)
"""
STAGES = ("pretrain", "sft", "preference", "reason")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("end_to_end")
    (root / "smoke.py").write_text(EXPERIMENT)
    words = np.random.default_rng(0).choice(
        ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run"], 20_000
    )
    (root / "text.txt").write_text("\n\n".join(" ".join(line) for line in words.reshape(-1, 50)))
    return root


def environment(folder: Path) -> dict[str, str]:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"JAX_NUM_CPU_DEVICES": "1"}


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lm.cli.main", *arguments], cwd=folder, env=environment(folder), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def call(folder: Path, *arguments: str, typed: str = "", code: int = 0) -> str:
    process = start(folder, *arguments)
    out, err = process.communicate(typed)
    assert process.returncode == code, err[-3000:]
    return out + err


def stop(folder: Path, stage: str, step: int, sign: signal.Signals) -> tuple[int, str]:
    """Start or resume the run `killed`, and send the signal when `step` is written down and a checkpoint is finished.

    It comes while the step after is evaluated, so that the stage does not get to its end before.
    """
    here = folder / "killed" / "stages" / stage
    process = start(folder, "run", "smoke.py", "--run-dir", "killed", "--no-report")

    def reached() -> bool:
        steps = [line["step"] for line in read_lines(here / "metrics.jsonl")]
        return step in steps and any((here / "checkpoints").glob("*/manifest.json"))

    while process.poll() is None and not reached():
        time.sleep(0.002)
    process.send_signal(sign)
    error = process.communicate()[1]
    assert not (here / "summary.json").exists(), error[-3000:]
    return process.returncode, error


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    call(folder, "run", "smoke.py", "--run-dir", "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def killed(folder, undisturbed) -> Path:
    for stage in STAGES:
        code, error = stop(folder, stage, 4, signal.SIGKILL)
        assert code == -signal.SIGKILL, error[-3000:]
    code, error = stop(folder, "reason", 9, signal.SIGTERM)
    assert code == 130, error[-3000:]
    assert re.search(
        r"\nlm: SIGTERM: saved at step (9|1[01]) of 12 of stage reason. To go on: lm run smoke.py --run-dir killed --no-report\n$",
        error,
    ), error
    call(folder, "run", "smoke.py", "--run-dir", "killed", "--no-report")
    return folder / "killed"


def metrics(run: Path, stage: str) -> list[dict]:
    lines = read_lines(run / "stages" / stage / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def evals(run: Path, stage: str) -> dict:
    """The last line of each kind; a run that was stopped may have written it before too."""
    return {(e["when"], e["step"], e["eval"]): e for e in read_lines(run / "stages" / stage / "eval.jsonl")}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_the_same_to_the_bit(undisturbed, killed, stage):
    whole, pieces = load_run(undisturbed, stage).model, load_run(killed, stage).model
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in metrics(killed, stage)] == list(range(1, 13))
    assert metrics(undisturbed, stage) == metrics(killed, stage)
    assert evals(undisturbed, stage) == evals(killed, stage)
    assert {when for when, *_ in evals(killed, stage)} == {"before", "during", "after"}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_kill_lost_is_accounted_and_the_parts_make_the_whole(undisturbed, killed, stage):
    whole, pieces = (json.loads((run / "stages" / stage / "summary.json").read_text()) for run in (undisturbed, killed))
    assert whole["lost_seconds"] == 0 < whole["start_seconds"] and pieces["lost_seconds"] > 0
    for spent in (whole, pieces):
        parts = sum(spent.get(name, 0.0) for name in (*PARTS, "step_seconds"))
        assert parts == pytest.approx(spent["seconds"], rel=0.01) and spent["step_seconds"] > 0


def test_a_finished_run_is_not_trained_again(folder, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/**/*")}
    call(folder, "run", "smoke.py", "--run-dir", "whole", "--no-report")
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/**/*")}


def test_a_changed_experiment_is_refused_with_the_two_ways_out(folder, undisturbed, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["run", "smoke.py", "--run-dir", "whole", "--sft.steps", "13"]) == 2
    said = capsys.readouterr().err
    assert "  sft.steps: 12 → 13\n" in said
    assert "--run-dir DIR" in said and "--fresh" in said


@pytest.mark.parametrize("stage", ["pretrain", "reason"])
def test_eval_says_the_runs_own_numbers_again(folder, undisturbed, stage):
    said = call(folder, "eval", "whole", "--stage", stage)
    said = "".join(line for line in said.splitlines(keepends=True) if not line.startswith("evaluating "))
    assert said.startswith(f"whole, after stage {stage}\n") and said.endswith("\nthe same as the run's own\n"), said


def test_a_run_is_a_model_in_a_notebook(undisturbed, monkeypatch, tmp_path):
    model = lm.load(undisturbed)
    prompts = ["What is an LLM?", "Repeat the word lantern."]
    answers = model.sample(prompts, max_new_tokens=8)
    assert model.sample(prompts[1], max_new_tokens=8) == answers[1:]
    assert model.sample([{"role": "user", "content": prompts[0]}], max_new_tokens=8) == answers[:1]
    [found, other] = model.logprobs([prompts[0]] * 2, [answers[0], "~"])
    assert found[-1].text == other[-1].text == "<|im_end|>" and all(token.logprob < 0 for token in found)
    assert found[0].logprob >= other[0].logprob  # greedy: no first token is likelier
    monkeypatch.chdir(tmp_path)
    for wrong, said in (
        (lambda: lm.load("nowhere"), "no folder nowhere"),
        (lambda: model.sample(prompts, top_p=2), "top_p is 2"),
    ):
        with pytest.raises(UserError, match=said):
            wrong()


def test_an_exported_stage_is_the_same_model(folder, undisturbed, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["export", "whole", "exported", "--stage", "sft"]) == 0
    again, own = lm.load("exported"), lm.load("whole", "sft")
    jax.tree.map(np.testing.assert_array_equal, again.loaded.model, own.loaded.model)
    assert again.sample("What is an LLM?", max_new_tokens=8) == own.sample("What is an LLM?", max_new_tokens=8)
    card = (folder / "exported" / "README.md").read_text()
    assert "# smoke, after stage sft" in card and "| sft | SFT | 12 |" in card and "text: bits per byte" in card
    assert "preference |" not in card and platform.node() not in card and str(Path.home()) not in card


def test_it_answers(folder, undisturbed, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    prompts = ["What is an LLM?", "Repeat the word lantern."]
    assert main(["sample", "whole", "--prompt", *prompts, "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n> {prompt}\n" in said for prompt in prompts), said
    assert main(["sample", "whole", "--stage", "pretrain", "--max-new-tokens", "64"]) == 0
    assert "pretrain" in capsys.readouterr().out
    said = call(folder, "chat", "whole", "--max-new-tokens", "8", typed="What is 2 + 3?\n\n")
    assert "Traceback" not in said


def test_data_and_config_and_report_show_it(folder, undisturbed, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["data", "smoke.py"]) == 0
    said = capsys.readouterr().out
    assert all(f"=== {stage}, step 0 ===" in said for stage in STAGES)
    assert "<|im_start|>assistant\n⟦" in said and "<|im_end|>⟧" in said and "right answer: " in said
    assert main(["config", "smoke.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((undisturbed / "experiment.json").read_text())
    assert main(["report", "whole"]) == 0
    page = (undisturbed / "report.html").read_text()
    assert "What is an LLM?" in page and "http://" not in page.replace("http://www.w3.org", "")
