"""All four stages through the `lm` command: killed in the middle of each, resumed, and equal to the bit in the end."""

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

from lm.train.stages import load_run

EXPERIMENT = '''
from lm.experiment import DPO, GRPO, SFT, Eval, Experiment, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

fast = Optimizer(peak_lr=1e-3, warmup_steps=2)
instruct = Source("gen:instruct", holdout=0.05)
arithmetic = Source("gen:arithmetic", holdout=0.05)
preferences = Source("gen:preferences", holdout=0.05)
experiment = Experiment(
    name="smoke",
    tokenizer=Tokenizer(vocab_size=512),
    model=Model(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64, max_len=128),
    stages=(
        Stage("pretrain", Pretrain(), (Source("text.txt", holdout=0.2),), fast, 12, 4, 64, save_every=4),
        Stage("sft", SFT(), (instruct, arithmetic), fast, 12, 4, 64, save_every=4),
        Stage("preference", DPO(), (preferences,), fast, 12, 4, 128, save_every=4),
        Stage("reason", GRPO(group_size=4, max_new_tokens=8, updates_per_rollout=2, kl_coef=0.1), (arithmetic,), fast, 12, 4, 80,
              save_every=4),
    ),
    evals=(
        Eval("text", Source("text.txt", holdout=0.2), "bits_per_byte", count=4),
        Eval("instruct", instruct, count=8, max_new_tokens=8),
        Eval("pairs", preferences, "pair_accuracy", count=8),
    ),
)
'''  # fmt: skip
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


def lm(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "lm.cli.main", *arguments]


def environment(folder: Path) -> dict[str, str]:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"JAX_NUM_CPU_DEVICES": "1"}


def call(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(lm(folder, *arguments), cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def stop_in(folder: Path, run: str, stage: str, step: int, sign: signal.Signals) -> tuple[int, str]:
    """Start or resume a run, and send the signal when the stage has written the metrics of `step`."""
    metrics = folder / run / "stages" / stage / "metrics.jsonl"
    process = subprocess.Popen(
        lm(folder, "run", "smoke.py", "--run-dir", run), cwd=folder, env=environment(folder),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            process.send_signal(sign)
            break
        time.sleep(0.005)
    output = process.communicate()[0]
    return process.returncode, output


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    call(folder, "run", "smoke.py", "--run-dir", "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def killed(folder, undisturbed) -> Path:
    for stage in STAGES:
        code, output = stop_in(folder, "killed", stage, 6, signal.SIGKILL)
        assert code == -signal.SIGKILL, output[-3000:]
    code, output = stop_in(folder, "killed", "reason", 9, signal.SIGTERM)
    assert code == 130 and "saved" in output, output[-3000:]
    call(folder, "run", "smoke.py", "--run-dir", "killed")
    return folder / "killed"


def metrics(run: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_the_same_to_the_bit(undisturbed, killed, stage):
    whole, pieces = load_run(undisturbed, stage).model, load_run(killed, stage).model
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [line["step"] for line in metrics(killed, stage)] == list(range(1, 13))
    assert metrics(undisturbed, stage) == metrics(killed, stage)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(folder, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/*/metrics.jsonl")}
    call(folder, "run", "smoke.py", "--run-dir", "whole")
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/*/metrics.jsonl")}


@pytest.mark.slow
def test_a_changed_experiment_is_refused_with_the_two_ways_out(folder, undisturbed):
    said = call(folder, "run", "smoke.py", "--run-dir", "whole", "--sft.steps", "13", code=2)
    assert "sft.steps" in said and "12" in said and "13" in said
    assert "--run-dir" in said and "--fresh" in said


@pytest.mark.slow
def test_the_commands_speak_of_the_run(folder, undisturbed):
    assert "the same as the run's own" in call(folder, "eval", "whole")
    assert call(folder, "sample", "whole", "--prompt", "What is an LLM?", "--max-new-tokens", "8").strip()
    call(folder, "report", "whole")
    page = (undisturbed / "report.html").read_text()
    assert "What is an LLM?" in page and "http://" not in page.replace("http://www.w3.org", "")
    for stage in STAGES:
        assert call(folder, "data", "smoke.py", "--stage", stage).strip()
    assert json.loads((undisturbed / "environment.json").read_text())
