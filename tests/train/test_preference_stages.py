"""Stages that learn preferences, through the whole loop: they learn, and continue to the bit from a checkpoint."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.experiment import (
    CPO,
    DPO,
    KTO,
    ORPO,
    Eval,
    Experiment,
    Mesh,
    Model,
    Optimizer,
    Source,
    Stage,
    Tokenizer,
    UserError,
)
from lm.train.loaded_run import load_run
from lm.train.metrics import read_lines
from lm.train.stages import run
from tests.train.runs import forget_last_checkpoint, metrics

pytestmark = pytest.mark.slow

STEPS, SAVED = 12, 6
STAGES = {
    "simpo": CPO(loss="simpo", beta=2.0, nll_coef=0.5),
    "kto": KTO(beta=0.5),
    "orpo": ORPO(),
    "cached": DPO(beta=0.5, reference="cached"),
    "mixed": DPO(losses=("sigmoid", "aot", "sft"), loss_weights=(1.0, 0.5, 0.2), weighting=True),
}


def experiment(folder: Path) -> Experiment:
    pairs, labelled = (Source(str(folder / name), holdout=0.2) for name in ("pairs.jsonl", "labelled.jsonl"))
    shared = {"optimizer": Optimizer(peak_lr=1e-2, warmup_steps=2), "steps": STEPS, "batch_size": 8, "seq_len": 48}

    def stage(name: str) -> Stage:
        sources = (labelled, pairs) if name == "kto" else (pairs,)
        pieces = {} if name == "mixed" else {"microbatches": 2}
        return Stage(name, STAGES[name], sources, save_every=SAVED, **shared, **pieces)

    return Experiment(
        name="preferences",
        stages=tuple(map(stage, STAGES)),
        evals=(Eval("pairs", pairs, "pair_accuracy", count=8, max_new_tokens=8),),
        prompts=(),
        tokenizer=Tokenizer(vocab_size=320),
        model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_len=48),
        mesh=Mesh(data=1),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("preferences")
    rng = np.random.default_rng(9)
    words = ["".join(rng.choice(list("abdeghiklmnoprstu"), 4)) for _ in range(60)]
    pairs = [{"prompt": f"Say {w}", "chosen": f"{w} yes", "rejected": "no"} for w in words]
    answers = [("yes", True), ("no", False)]
    labelled = [{"prompt": f"Tell {w}", "completion": a, "label": good} for w in words for a, good in answers]
    for name, rows in (("pairs", pairs), ("labelled", labelled)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(experiment(root), root / "whole")
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_the_preferred_answers_win(folder, stage):
    lines = metrics(folder / "whole", stage)
    margins = [line["reward_chosen"] - line["reward_rejected"] for line in lines]
    assert len(lines) == STEPS and margins[-1] > margins[0] and margins[-1] > 0
    if stage == "kto":
        assert margins[0] == 0 and lines[0]["kl"] == 0  # the policy is still the reference


@pytest.fixture(scope="module")
def resumed(folder) -> Path:
    """A copy of the run in which every stage has lost what came after its first checkpoint, run again."""
    again = folder / "resumed"
    shutil.copytree(folder / "whole", again)
    for stage in STAGES:
        forget_last_checkpoint(again, stage, STEPS // SAVED)
    run(experiment(folder), again)
    return again


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_is_the_same_to_the_bit(folder, resumed, stage):
    whole, pieces = load_run(folder / "whole", stage).model, load_run(resumed, stage).model
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics(folder / "whole", stage) == metrics(resumed, stage)
    assert len((resumed / "stages" / stage / "metrics.jsonl").read_text().splitlines()) == STEPS


def alone(folder: Path, reference: str, **changes) -> Experiment:
    """One stage of DPO, over more epochs than one, that measures nothing."""
    whole = experiment(folder)
    objective = DPO(beta=0.5, losses=("sigmoid", "ipo"), loss_weights=(1.0, 0.01), reference=reference)
    (stage,) = (stage for stage in whole.stages if stage.name == "cached")
    return dataclasses.replace(
        whole, stages=(dataclasses.replace(stage, objective=objective, **changes),), evals=(), seed=3
    )


def test_a_cached_reference_teaches_what_one_in_the_step_does(folder, capsys):
    for reference in ("step", "cached"):
        run(alone(folder, reference), folder / reference)
    for one, other in zip(metrics(folder / "step", "cached"), metrics(folder / "cached", "cached"), strict=True):
        for name in ("loss", "reward_margin", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), (name, one["step"])
    # 48 pairs or so, each looked at once, though the stage sees 96
    assert re.search(r"cached reference  step 6/6 ", capsys.readouterr().out)


def test_a_damaged_cache_of_the_reference_is_made_anew(folder, capsys):
    def known() -> dict[str, np.ndarray]:
        with np.load(folder / "damaged" / "stages" / "cached" / "reference.npz") as arrays:
            return dict(arrays)

    run(alone(folder, "cached", steps=2), folder / "damaged")
    before, path = known(), folder / "damaged" / "stages" / "cached"
    (path / "reference.npz").write_bytes((path / "reference.npz").read_bytes()[:-30])
    (path / "summary.json").unlink()
    capsys.readouterr()
    run(alone(folder, "cached", steps=2), folder / "damaged")
    assert "reference.npz is damaged" in capsys.readouterr().out
    assert all(np.array_equal(before[name], found) for name, found in known().items())


def test_pairs_are_compared_with_the_model_that_entered_the_first_of_them(folder):
    lines = read_lines(folder / "whole" / "stages" / "simpo" / "eval.jsonl")
    assert [(line["when"], line["margin"]) for line in lines if line["when"] == "before"] == [("before", 0.0)]
    assert lines[-1]["margin"] != 0


@pytest.mark.parametrize(
    ("body", "bad"),
    [
        ("1 / (0 * chosen)", r"loss is (nan|inf|-inf)"),
        ("jnp.sqrt(0 * (chosen - rejected))", r"grad_norm is nan"),  # the value is 0, and its gradient is not finite
    ],
)
def test_a_loss_of_ones_own_that_is_not_finite_is_named(folder, tmp_path, body, bad):
    name = f"{tmp_path / 'own.py'}:mine"
    (tmp_path / "own.py").write_text(
        f"import jax.numpy as jnp\ndef mine(chosen, rejected, knobs): return {body}\n", "utf-8"
    )
    whole = alone(folder, "step", steps=2, microbatches=1)
    stage = dataclasses.replace(whole.stages[0], objective=DPO(losses=("sigmoid", name)))
    with pytest.raises(
        UserError, match=rf"^cached: {bad} at step 1; .*cached\.objective\.losses \({name}\) and its gradient"
    ):
        run(dataclasses.replace(whole, stages=(stage,)), tmp_path / "run")
