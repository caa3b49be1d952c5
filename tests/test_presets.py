"""Presets of the GRPO family, and that every parameter of an objective is reached from the fields of an experiment."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lm.objectives
from lm.algorithms import algorithm_of
from lm.algorithms.state import first_state
from lm.check import check
from lm.cli.main import main
from lm.config import presets
from lm.config.presets import PRESETS, apply_preset
from lm.experiment import (
    CPO,
    DPO,
    GRPO,
    OBJECTIVES,
    PPO,
    Collect,
    Distill,
    Experiment,
    Mesh,
    RewardModel,
    Source,
    Stage,
    UserError,
)
from lm.objectives.grpo import grpo
from lm.objectives.importance import sampler_correction
from lm.overrides import override
from lm.parallel.mesh import make_mesh
from tests.helpers import random_batch, tiny_model, tiny_stage

EXPERIMENT = Experiment("some", (Stage("reason", GRPO(), (Source("gen:arithmetic"),), batch_size=8),))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_value_that_can_run_and_be_set_by_name(name):
    value = getattr(presets, name)
    stage = dataclasses.replace(EXPERIMENT.stages[0], objective=value)
    check(dataclasses.replace(EXPERIMENT, stages=(stage,)))
    words = [word for other in ("rloo", name) for word in ("--reason.objective.preset", other)]
    found = check(override(EXPERIMENT, words)).stages[0].objective
    assert dataclasses.replace(found, verifiers=value.verifiers) == value  # nothing of the preset before it is left


def test_a_preset_keeps_the_importance_correction_or_sets_all_of_it():
    given = GRPO(tis_clip=3.0, tis_mode="mask", tis_low=0.1)
    assert apply_preset(given, "dapo", "x").tis_low == 0.1
    assert apply_preset(given, "tis", "x") == presets.tis


def test_an_unknown_preset_and_one_of_another_objective_are_refused():
    with pytest.raises(UserError, match=r"reason.objective.preset is 'dapa'; did you mean dapo\?; it should be one of"):
        override(EXPERIMENT, ["--reason.objective.preset", "dapa"])
    with pytest.raises(UserError, match="needs a value: one of grpo, dr_grpo"):
        override(EXPERIMENT, ["--reason.objective.preset"])
    other = dataclasses.replace(EXPERIMENT, stages=(dataclasses.replace(EXPERIMENT.stages[0], objective=PPO()),))
    with pytest.raises(UserError, match="presets are of GRPO, and this objective is PPO"):
        override(other, ["--reason.objective.preset", "dapo"])


def test_presets_are_shown_in_80_columns(capsys):
    assert main(["config", "--presets"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert all(f"\n{name}  {preset.paper}" in said for name, preset in PRESETS.items())


def by_hand(o_name: str, x: dict[str, np.ndarray]) -> float:
    """What the loss of a preset is for completions of x without masked tokens, written from its equation."""
    log_ratio = x["logp"] - x["old_logp"]
    ratio, advantage, logp = np.exp(log_ratio), x["advantages"], x["logp"]
    kl = np.exp(x["ref_logp"] - logp) - (x["ref_logp"] - logp) - 1
    weight = np.exp(x["old_logp"] - x["sampler_logp"])
    geometric, product = np.exp(log_ratio.mean(1, keepdims=True)), np.exp(log_ratio.sum(1, keepdims=True))

    def clip(r, low=0.2, high=0.2):
        return np.minimum(r * advantage, np.clip(r, 1 - low, 1 + high) * advantage)

    gains = {
        "grpo": lambda: clip(ratio) - 0.04 * kl,
        "dr_grpo": lambda: clip(ratio) * logp.shape[1] / GRPO().max_new_tokens,
        "dapo": lambda: clip(ratio, high=0.28),
        "gspo": lambda: clip(geometric, 3e-4, 4e-4),
        "rloo": lambda: clip(product),
        "reinforce_pp": lambda: clip(ratio),
        "reinforce_pp_baseline": lambda: clip(ratio) - 0.01 * 0.5 * (logp - x["ref_logp"]) ** 2,
        "cispo": lambda: np.minimum(ratio, 5) * advantage * logp,
        "sapo": lambda: (t := np.where(advantage > 0, 1, 1.05)) * 0 + 4 / t / (1 + np.exp(-t * (ratio - 1))) * advantage,
        "gmpo": lambda: advantage * np.exp(
            np.where(advantage > 0, np.minimum(log_ratio, 0.4), np.maximum(log_ratio, -0.4)).mean(1, keepdims=True)
        ),
        "luspo": lambda: clip(geometric, 2e-3, 2.5e-3) * logp.shape[1],
        "vespo": lambda: np.where(
            advantage >= 0, product**2 * np.exp(3 - 3 * product), product**3 * np.exp(2 - 2 * product)
        ) * advantage * logp,
        "gdpo": lambda: clip(ratio),
        "two_sided": lambda: np.minimum(
            np.minimum(ratio, 4) * advantage, np.clip(ratio, 0.8, 1.2) * advantage
        ) - 0.001 * kl,
        "high_entropy": lambda: clip(ratio, high=0.28) * (x["entropy"] >= np.quantile(x["entropy"], 0.8)),
        "deepseek_v3_2": lambda: clip(ratio) * ((advantage >= 0) | (-log_ratio.mean(1, keepdims=True) <= 0.05))
        - 0.04 * ratio * kl,
        "tis": lambda: np.minimum(weight, 2) * clip(ratio),
        "icepop": lambda: weight * ((weight >= 0.5) & (weight <= 5)) * clip(ratio),
        "decoupled": lambda: weight * (weight <= 5) * clip(ratio),
    }  # fmt: skip
    return float(-np.mean(gains[o_name]()))


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_of_a_preset_is_its_equation(name):
    """Rows are of one length here, so that a mean over rows is one over tokens."""
    rng = np.random.default_rng(3)
    x = {key: -rng.exponential(size=(6, 5)) for key in ("logp", "entropy")}
    x |= {key: x["logp"] + 0.3 * rng.normal(size=(6, 5)) for key in ("old_logp", "ref_logp")}
    x["advantages"] = np.broadcast_to(rng.normal(size=(6, 1)), (6, 5)).copy()
    x["sampler_logp"] = x["old_logp"] - np.linspace(-2, 2, 30).reshape(6, 5)
    o = PRESETS[name].config
    with jax.enable_x64(True):
        arrays = {key: jnp.asarray(value) for key, value in x.items()} | {"mask": jnp.ones((6, 5))}
        if not o.kl_coef or o.kl_in == "reward":
            del arrays["ref_logp"]
        sampler_logp = arrays.pop("sampler_logp")
        if o.tis_clip:
            arrays["correction"] = sampler_correction(arrays["old_logp"], sampler_logp, arrays["mask"], o)
        assert float(grpo(**arrays, o=o)[0].value()) == pytest.approx(by_hand(name, x), rel=1e-10)


# ---- everything is reachable ---------------------------------------------------------------------------------------

# Fields of GRPO that a step reads, each with a value that changes it, and what it needs beside it.
STEP_FIELDS = {
    "ratio_level": ("sequence", {}), "surrogate": ("sapo", {}), "clip_low": (0.01, {}), "clip_high": (0.01, {}),
    "delta": (1.21, {}), "sapo_tau_pos": (3.0, {"surrogate": "sapo"}), "sapo_tau_neg": (3.0, {"surrogate": "sapo"}),
    "vespo_k_pos": (1.0, {"surrogate": "vespo"}), "vespo_lambda_pos": (1.0, {"surrogate": "vespo"}),
    "vespo_k_neg": (1.0, {"surrogate": "vespo"}), "vespo_lambda_neg": (1.0, {"surrogate": "vespo"}),
    "aggregation": ("sequence_sum", {}), "top_entropy": (0.5, {}), "off_policy_kl": (0.01, {}), "kl_coef": (0.5, {}),
    "kl_estimator": ("k2", {"kl_coef": 0.5}), "kl_in": ("reward", {"kl_coef": 0.5}),
    "kl_correction": (True, {"kl_coef": 0.5}), "entropy_coef": (0.5, {}), "temperature": (0.5, {}), "tis_clip": (1.01, {}),
    "tis_level": ("sequence", {"tis_clip": 1.01}), "tis_mode": ("mask", {"tis_clip": 1.01}),
    "tis_low": (0.99, {"tis_mode": "mask", "tis_clip": 1.5}),
}  # fmt: skip


def gradient_norm(o) -> float:
    stage, optimizer = tiny_stage(o), optax.sgd(0.1)
    state = first_state(stage, optimizer, tiny_model(num_layers=1))
    if "reference" in state.frozen:
        state.frozen["reference"] = tiny_model(seed=1, num_layers=1)
    batch = random_batch()
    with jax.set_mesh(make_mesh(Mesh(data=1))):
        step = algorithm_of(stage).step(stage, optimizer)
        return float(jax.jit(lambda state, batch: step(state, batch)[1]["grad_norm"])(state, batch))


@pytest.mark.slow
def test_every_field_changes_a_step():
    norms: dict[GRPO, float] = {}
    for name, (value, rest) in STEP_FIELDS.items():
        before = GRPO(max_new_tokens=8, **rest)
        after = dataclasses.replace(before, **{name: value})
        for o in (before, after):
            norms[o] = norms.get(o) or gradient_norm(o)
            assert np.isfinite(norms[o]) and norms[o] > 0
        assert norms[before] != norms[after], name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"entropy_coef": 0.5}, {"value_after_end": True}], ids=str)
def test_fields_of_ppo_change_a_step(changes):
    plain = PPO(max_new_tokens=8, critic="head")
    assert gradient_norm(dataclasses.replace(plain, **changes)) != gradient_norm(plain)


# Parameters of public functions of lm/objectives that are neither arrays nor the config.
NOT_FIELDS = {
    "max_len": "longest completion, GRPO.max_new_tokens", "bounds": "GRPO.reward_clip", "weights": "GRPO.reward_weights",
    "scale": "GRPO.advantage_scale", "max_kl": "GRPO.off_policy_kl", "share": "GRPO.top_entropy", "name": "row of a table",
    "loss": "row of KTO's table", "keep_mean": "PPO.whiten_rewards keeps the mean, advantages do not",
    "target": "PPO.kl_target", "horizon": "PPO.kl_horizon", "answers": "rows of the batch", "model": "what is trained",
    "batch": "what it is trained on", "max_logits": "Model.max_logits", "head": "part of the model", "scorer": "a model",
    "want_entropy": "asked for by a step", "want_mean_logp": "asked for by a step", "want_log_sum_sq": "asked for by a step",
    "x": "what a surrogate reads of the tokens", "stats": "log-probabilities of the batch",
    "logits": "made by the model", "size": "made by the batch", "student": "the model that is trained", "vocab": "made by the models",
    "models": "those that project to the vocabulary", "project": "statistics of logits",
}  # fmt: skip


ARRAYS = ("Float[", "Num[", "Bool[", "Int[", "Tokens", "Rows", "Pairs", "Groups", "Scalar", "Rewards", "Mean", "Array")


def test_no_parameter_of_an_objective_is_unreachable():
    """Of every public function that takes an array."""
    fields = {f.name for kind in OBJECTIVES.values() for f in dataclasses.fields(kind)}
    lost = set()
    for found in pkgutil.iter_modules(lm.objectives.__path__):
        module = importlib.import_module(f"lm.objectives.{found.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            kinds = {one.name: str(one.annotation) for one in inspect.signature(function).parameters.values()}
            arrays = {one for one, kind in kinds.items() if any(word in kind for word in ARRAYS)}
            for one, kind in kinds.items() if arrays else ():
                config = one in ("o", "k") or any(kind.startswith(objective) for objective in OBJECTIVES)
                if not config and one not in arrays | fields | NOT_FIELDS.keys():
                    lost.add(f"{found.name}.{name}({one}: {kind})")
    assert not lost


def test_every_field_of_an_objective_is_read_somewhere():
    unread = {f.name for one in OBJECTIVES.values() for f in dataclasses.fields(one)}
    for file in Path(lm.__file__).parent.rglob("*.py"):
        text = file.read_text()
        if any(f".{name}" in text for name in unread):  # to parse every file takes seconds
            unread -= {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert not unread


# ---- combinations without meaning ----------------------------------------------------------------------------------

REFUSED = [
    ({"surrogate": "cispo", "clip_high": 5.0, "clip_low": 0.1}, "clip_low", "surrogate"),
    ({"surrogate": "cispo"}, "surrogate", "clip_high"),
    ({"surrogate": "sapo", "clip_high": 0.3}, "clip_high", "surrogate"),
    ({"surrogate": "sapo", "delta": 2.0}, "delta", "surrogate"),
    ({"sapo_tau_pos": 2.0}, "sapo_tau_pos", "surrogate"),
    ({"delta": 1.1}, "delta", "clip_high"),
    ({"baseline": "leave_one_out"}, "baseline", "advantage_scale"),
    ({"baseline": "leave_one_out", "advantage_scale": "none", "group_size": 1}, "group_size", "baseline"),
    ({"group_size": 1}, "group_size", "baseline"),
    ({"baseline": "none"}, "baseline", "advantage_scale"),
    ({"baseline": "none", "advantage_scale": "none", "group_size": 1, "rollouts": 2}, "group_size", "rollouts"),
    ({"ratio_level": "sequence", "tis_clip": 2.0}, "ratio_level", "tis_level"),
    ({"surrogate": "gmpo", "ratio_level": "sequence"}, "ratio_level", "surrogate"),
    ({"surrogate": "vespo", "tis_clip": 2.0, "tis_level": "sequence"}, "surrogate", "tis_level"),
    ({"tis_mode": "mask"}, "tis_mode", "tis_clip"),
    ({"tis_clip": 2.0, "tis_low": 0.5}, "tis_low", "tis_mode"),
    ({"kl_coef": 0.1, "kl_estimator": "k1"}, "kl_estimator", "kl_in"),
    ({"kl_coef": 0.1, "kl_in": "reward", "kl_correction": True}, "kl_correction", "kl_in"),
    ({"kl_correction": True}, "kl_correction", "kl_coef"),
    ({"reward_combination": "decoupled"}, "reward_combination", "verifiers"),
    ({"verifiers": ("answer", "style"), "reward_weights": (1.0,)}, "reward_weights", "verifiers"),
    ({"verifiers": ("answer", "style"), "verifier": "style"}, "verifier", "verifiers"),
    (
        {"verifiers": ("answer", "style"), "reward_combination": "decoupled", "advantage_scale": "none"},
        "reward_combination", "advantage_scale",
    ),
]  # fmt: skip
REFUSED_OTHERS = [
    (PPO(verifier="answer", ensemble="min"), "ensemble", "reward_models"),
    (PPO(verifier="answer", kl_target=1.0, kl_coef=0.0), "kl_target", "kl_coef"),
    (PPO(verifier="answer", kl_horizon=10), "kl_horizon", "kl_target"),
    (DPO(tau=0.3), "tau", "losses"),
    (CPO(gamma=2.0), "gamma", "loss"),
    (RewardModel(tie_width=2.0), "tie_width", "ties"),
    (Collect(verifier="answer", least_score=0.5), "least_score", "make"),
    (Collect(verifier="answer", most_answers=2, make="best"), "most_answers", "make"),
    (Collect(verifier="answer", answers=1), "answers", "make"),
    (Collect(verifier="answer", make="all", hint="{prompt} {final}"), "hint", "least_score"),
    (Distill(), "teacher", "teacher_prompt"),
    (Distill(teacher="some:sft", on_policy=0.0, verifier="answer"), "verifier", "on_policy"),
    (Distill(teacher="some:sft", on_policy=0.0, temperature=0.5), "temperature", "on_policy"),
]


@pytest.mark.parametrize(
    "objective, one, other",
    [(GRPO(**fields), one, other) for fields, one, other in REFUSED] + REFUSED_OTHERS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_combination_without_meaning_names_both_fields_and_what_would_work(objective, one, other):
    stage = dataclasses.replace(EXPERIMENT.stages[0], objective=objective)
    with pytest.raises(UserError) as refusal:
        check(dataclasses.replace(EXPERIMENT, stages=(stage,)))
    said = str(refusal.value)
    assert f"reason.objective.{one} is" in said and other in said and "should be" in said and "\n" not in said


def test_tokens_of_highest_entropy_need_the_whole_batch():
    stage = dataclasses.replace(EXPERIMENT.stages[0], objective=GRPO(top_entropy=0.2), microbatches=2)
    with pytest.raises(UserError, match=r"top_entropy is 0.2 and reason.microbatches is 2; .* should be 1"):
        check(dataclasses.replace(EXPERIMENT, stages=(stage,)))
