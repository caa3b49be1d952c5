"""A run stops where it is told to, goes on from there to the bit on any layout, and never trains a stage twice."""

import os
import signal

import jax
import numpy as np
import pytest

from lm.experiment import GRPO, Experiment, Mesh, Model, Optimizer, Pretrain, Source, Stage, Tokenizer, UserError
from lm.rollout import verifiers
from lm.train.loop import Interrupted
from lm.train.metrics import read_lines
from lm.train.stages import load_run, run

SUMS = Source("gen:arithmetic", holdout=0.5)


def experiment(*stages: Stage, **changes) -> Experiment:
    model = Model(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, max_len=96)
    return Experiment("x", stages, prompts=(), tokenizer=Tokenizer(512), model=model, **changes)


def stage(name: str, objective, source: Source) -> Stage:
    optimizer = Optimizer(peak_lr=1e-2, warmup_steps=2)
    return Stage(name, objective, (source,), optimizer, steps=6, batch_size=8, seq_len=64, save_every=2)


def leaves(run_dir, name) -> list[np.ndarray]:
    return jax.device_get(jax.tree.leaves(load_run(run_dir, name).model))


def terminate(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def texts(tmp_path) -> Source:
    lines = "\n\n".join(f"{n} plus {n} is {2 * n}, and {n} times {n} is {n * n}. " * 40 for n in range(40))
    (tmp_path / "text.txt").write_text(lines)
    return Source(str(tmp_path / "text.txt"), holdout=0.2)


def test_stages_end_where_they_should(tmp_path, texts):
    plan = experiment(*(stage(name, Pretrain(), texts) for name in ("one", "two", "three")))
    folder, finished = tmp_path / "run", []
    with pytest.raises(UserError, match="no stage 'four'; the stages are one, two, three"):
        run(plan, folder, until="four")
    # A signal that comes between two stages stops before the next.
    with pytest.raises(Interrupted, match="SIGTERM: stopped before stage two"):
        run(plan, folder, after_stage=terminate)
    run(plan, folder, until="two", after_stage=finished.append)
    assert len(finished) == 1 and not (folder / "stages" / "three").exists()
    one = leaves(folder, "one")
    run(plan, folder, after_stage=finished.append)
    assert len(finished) == 2
    for old, new in zip(one, leaves(folder, "one"), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_sharded_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    """Rollouts, parameters and moments that are split over eight devices; stopped in the middle of a step."""
    asked = []

    def judge(row, completion: str) -> float:
        asked.append(completion)
        if len(asked) == stop_at:
            terminate()
        return (len(completion) % 3) / 2

    monkeypatch.setitem(verifiers.VERIFIERS, "length", judge)
    monkeypatch.setitem(verifiers.NEEDS, "length", ())
    objective = GRPO(verifier="length", group_size=4, max_new_tokens=8, updates_per_rollout=2, kl_coef=0.1)
    plan = experiment(stage("grpo", objective, SUMS), mesh=Mesh(data=2, fsdp=2, tensor=2))
    stop_at = 0
    run(plan, tmp_path / "whole")
    asked.clear()
    stop_at = 2 * 32 + 5
    with pytest.raises(Interrupted, match="SIGTERM: saved at step 3 of 6 of stage grpo"):
        run(plan, tmp_path / "pieces")
    run(plan, tmp_path / "pieces")
    assert len(asked) == 6 * 32
    for a, b in zip(leaves(tmp_path / "whole", "grpo"), leaves(tmp_path / "pieces", "grpo"), strict=True):
        np.testing.assert_array_equal(a, b)
    rewards = [
        [line["reward"] for line in read_lines(tmp_path / name / "stages" / "grpo" / "metrics.jsonl")]
        for name in ("whole", "pieces")
    ]
    assert rewards[0] == rewards[1] and len(set(rewards[0])) > 1
