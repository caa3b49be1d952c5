"""Experiments survive JSON, are overridden by name, and refuse what cannot be, in one line that helps."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lm.check import check, short_warmups
from lm.experiment import (
    CPO,
    DPO,
    GRPO,
    KTO,
    ORPO,
    SFT,
    Eval,
    Experiment,
    Model,
    Pretrain,
    Source,
    Stage,
    UserError,
    diff,
    flatten,
    from_dict,
    to_dict,
)  # fmt: skip
from lm.files import defined_in, load
from lm.optimizer import schedule
from lm.overrides import knobs, override
from lm.papers import paper as papers
from lm.sweep.cost import representatives
from lm.sweep.sweep import Sweep
from lm.sweep.sweep import load as load_sweep
from lm.sweep.trials import trials

DOCS = Source("gen:docs")
OBJECTIVES = {
    "pretrain": Pretrain(), "sft": SFT(), "dpo": DPO(), "cpo": CPO(), "orpo": ORPO(), "kto": KTO(), "grpo": GRPO(),
}  # fmt: skip
STAGES = tuple(Stage(name, objective, (DOCS,)) for name, objective in OBJECTIVES.items())
EXPERIMENT = Experiment(name="x", stages=STAGES, evals=(Eval("docs", DOCS, "bits_per_byte"),))


def test_json_and_back_is_the_same_value():
    assert from_dict(json.loads(json.dumps(to_dict(EXPERIMENT)))) == EXPERIMENT


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--sft.steps", "200"], "sft.steps", 200),
        (["--sft.steps=2e3"], "sft.steps", 2000),
        (["--model.num-layers", "3"], "model.num_layers", 3),
        (["--sft.optimizer.peak_lr", "3e-4"], "sft.optimizer.peak_lr", 3e-4),
        (["--model.qk_norm", "false"], "model.qk_norm", False),
        (["--grpo.objective.aggregation", "sequence"], "grpo.objective.aggregation", "sequence"),
        (["--pretrain.sources.0.path", "a.txt"], "pretrain.sources.0.path", "a.txt"),
        (["--tokenizer.path", "t.model"], "tokenizer.path", "t.model"),
        (["--evals.docs.count", "7"], "evals.docs.count", 7),
        (["--dpo.objective.losses", "sigmoid,sft"], "dpo.objective.losses", ["sigmoid", "sft"]),
        (["--dpo.objective.loss_weights", "0.8,1"], "dpo.objective.loss_weights", [0.8, 1.0]),
        (["--prompts", "a, b"], "prompts", ["a", "b"]),
        (["--model.rope_scaling", "8,1,4,64"], "model.rope_scaling", [8.0, 1.0, 4.0, 64.0]),
    ],
)
def test_an_override_changes_its_leaf_and_no_other(words, name, value):
    changed = diff(to_dict(EXPERIMENT), to_dict(override(EXPERIMENT, words)))
    assert [(n, new) for n, _, new in changed] == [(name, value)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sft.stepz", "2"], r"no knob '--sft\.stepz'; did you mean sft\.steps"),
        (["--steps", "2"], "did you mean .*steps"),
        (["--sft.steps", "many"], "--sft.steps is 'many'; it should be an integer"),
        (["--sft.steps"], "--sft.steps needs a value: an integer"),
        (["--model.remat", "some"], "one of none, full, minimal, dots, offload"),
        (
            ["--dpo.objective.losses", "sigmoid,stf"],
            "--dpo.objective.losses is 'sigmoid,stf'; it should be a list of names among .*sigmoid, ",
        ),
        (["--prompts", "[1"], "--prompts is '\\[1'; it should be a list"),
        (["sft.steps", "2"], "no knob 'sft.steps'"),
    ],
)
def test_a_wrong_override_says_what_would_work(words, message):
    with pytest.raises(UserError, match=message):
        override(EXPERIMENT, words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model.num_kv_heads", "3"], "num_heads is 4; it should be a multiple of model.num_kv_heads, 3"),
        (
            ["--model.attention", "cudnn"],
            "compute_dtype is float32 and model.attention is cudnn, which computes in bfloat16",
        ),
        (
            ["--model.attention", "cudnn", "--model.compute_dtype", "bfloat16", "--model.softcap", "30"],
            "softcap is set and model.attention is cudnn",
        ),
        (["--model.num_kv_heads", "0"], "model.num_kv_heads is 0; it should be an integer from 1 to 16384"),
        (["--model.head_dim", "7"], "head_dim is 7; it should be even"),
        (
            ["--model.rope_scaling", "8,1,4"],
            r"rope_scaling is \[8.0, 1.0, 4.0\]; it should be empty, or have 1 \(LinearRope\), 2",
        ),
        (["--sft.optimizer.peak_lr", "nan"], "sft.optimizer.peak_lr is nan; it should be a number from 1e-12 to 1000"),
        (["--sft.seq_len", "1024"], "sft.seq_len is 1024; it should be at most model.max_len 512"),
        (["--sft.steps", "0"], "sft.steps is 0; it should be an integer from 1 to 1000000000"),
        (["--sft.microbatches", "5"], "sft.microbatches is 5; it should divide the 32 rows"),
        (["--grpo.objective.group_size", "0"], "group_size is 0; it should be an integer from 1 to 65536"),
        (["--grpo.objective.max_new_tokens", "256"], "max_new_tokens is 256; it should be below grpo.seq_len 256"),
        (
            ["--grpo.objective.updates_per_rollout", "3"],
            "updates_per_rollout is 3; it should divide the 256 completions",
        ),
        (["--dpo.objective.label_smoothing", "0.5"], "should be a number of at least 0 and below 0.5"),
        (
            ["--dpo.objective.losses", "hinge", "--dpo.objective.label_smoothing", "0.1"],
            "0.1, which hinge does not use",
        ),
        (["--dpo.objective.losses", "[]"], r"losses is \[\]; it should have at least one loss"),
        (["--dpo.objective.losses", "ipo,ipo"], "each only once"),
        (["--dpo.objective.loss_weights", "1,2"], "loss_weights has 2 numbers and dpo.objective.losses 1 losses"),
        (["--dpo.objective.ld_alpha", "1.5"], "ld_alpha is 1.5; it should be a number from 0 to 1"),
        (
            ["--dpo.objective.losses", "aot", "--dpo.microbatches", "2"],
            "dpo.microbatches is 2 and dpo.objective.losses has aot, which ranks all pairs",
        ),
        (["--dpo.microbatches", "64"], "dpo.microbatches is 64; it should divide the 32 pairs"),
        (["--cpo.objective.alpha", "0.2"], "cpo.objective.alpha is 0.2 and loss is sigmoid"),
        (["--cpo.objective.loss", "hinge", "--cpo.objective.label_smoothing", "0.1"], "which hinge does not use"),
        (["--kto.batch_size", "1"], "kto.batch_size is 1; .* should be at least 2"),
        (["--evals.docs.max_new_tokens", "512"], "max_new_tokens is 512; it should be below model.max_len 512"),
        (["--sft.evals", "dogs"], "sft.evals has 'dogs'; the experiment's evals are docs"),
        (["--sft.name", "pretrain"], "no name twice"),
        (["--sft.name", "model"], "'model' is also a field of the experiment"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(words, message):
    check(EXPERIMENT)
    with pytest.raises(UserError, match=message):
        check(override(EXPERIMENT, words))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sead": 1}, "no field 'sead'; did you mean seed"),
        ({"seed": "1"}, r"seed is '1'; it should be an integer"),
        ({"seed": True}, r"seed is True; it should be an integer"),
    ],
)
def test_a_wrong_json_value_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_dict(to_dict(EXPERIMENT) | change)


def test_a_run_that_ends_within_the_default_warmup_is_told():
    short = override(EXPERIMENT, ["--sft.steps", "5"])
    assert check(short) == short and not short_warmups(EXPERIMENT)
    assert short_warmups(short) == [
        "sft: its 5 updates end within the warm-up, sft.optimizer.warmup_steps 20: the learning rate reaches 0.00025 of "
        "peak_lr 0.001"
    ]


@pytest.mark.parametrize(
    ("steps", "decay_frac", "told"),
    [(100, 0.8, False), (100, 0.81, True), (25, 0.2, False), (22, 0.2, True), (10, 0.2, True)],
)
def test_a_decay_that_begins_within_the_default_warmup_is_told(steps, decay_frac, told):
    words = [
        "--sft.steps",
        str(steps),
        "--sft.optimizer.schedule",
        "wsd",
        "--sft.optimizer.decay_frac",
        str(decay_frac),
    ]
    short = check(override(EXPERIMENT, words))
    stage = next(stage for stage in short.stages if stage.name == "sft")
    assert (max(map(schedule(stage.optimizer, steps), range(steps))) < stage.optimizer.peak_lr * 0.9999) == told
    assert len(short_warmups(short)) == told
    assert all("wsd's decay" in line and "does not reach peak_lr 0.001" in line for line in short_warmups(short))


def test_every_knob_has_a_line_of_help():
    for knob in knobs(EXPERIMENT):
        assert knob.help and "\n" not in knob.help, knob.name


def test_flatten_names_stages_at_the_top():
    leaves = flatten(to_dict(EXPERIMENT))
    assert (
        leaves["sft.steps"] == 1000
        and leaves["dpo.objective.kind"] == "DPO"
        and leaves["model.num_layers"] == Model().num_layers
    )


def test_experiments_that_ship_are_sound():
    root = Path(__file__).parent.parent / "experiments"
    claims = {page.with_suffix(".py") for page in (root / "papers").glob("*.md")}
    sweeps = set((root / "ablations").glob("*.py"))
    for path in sorted(set(root.rglob("*.py")) - claims - sweeps):
        check(load(str(path)))
    for path in sorted(sweeps):
        representatives(load_sweep(str(path)))
    for path in sorted(claims):
        paper = papers.load(str(path))
        for name in (*paper.sweeps, *paper.quick):
            assert trials(defined_in(path, name, Sweep))


def test_a_file_that_is_not_there_or_defines_nothing_is_said(tmp_path):
    with pytest.raises(
        UserError, match=r"no experiment '.*'.*; there are .*quickstart.* in experiments and .*experiments; or give"
    ):
        load("quickstrat")
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(UserError, match="defines no `experiment`"):
        load(str(tmp_path / "empty.py"))


def test_it_imports_nothing_slow():
    code = "import sys, lm.experiment; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_eval_can_name_the_source_of_a_stage():
    own = Source("mine.jsonl", holdout=0.3)
    stages = (Stage("a", SFT(), (DOCS, own)), Stage("b", SFT(), (own,)))
    evals = tuple(Eval(path, Source(path)) for path in ("stage:a", "stage:a.1", "stage:b", "other.txt"))
    found = override(Experiment(name="x", stages=stages, evals=evals), ["--b.sources.0.path", "yours.jsonl"]).evals
    assert [item.source for item in found] == [
        DOCS, own, dataclasses.replace(own, path="yours.jsonl"), Source("other.txt"),
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["stage:aa", "stage:a.2", "stage:"])
def test_a_stage_or_source_that_is_not_there_is_named(path):
    experiment = Experiment(name="x", stages=(Stage("a", SFT(), (DOCS, DOCS)),), evals=(Eval("it", Source(path)),))
    with pytest.raises(UserError, match=r"evals\.it\.source\.path is 'stage:"):
        override(experiment, [])
