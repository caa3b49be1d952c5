"""Checks of an experiment that need neither data nor devices; `check` raises a one-line UserError."""

from __future__ import annotations

import dataclasses

from lm.config.model import LAYER_FIELDS
from lm.config.objective import check_environment
from lm.config.rope import rope_fault
from lm.experiment import (
    COLLECTED,
    Eval,
    Experiment,
    Model,
    Optimizer,
    Source,
    Stage,
    Tokenizer,
    UserError,
    reward_names,
    rows_per_example,
    rows_per_update,
    start_of,
    strict,
    updates_per_step,
)


def check(experiment: Experiment) -> Experiment:
    """Validate an experiment as far as is possible without data or devices, and return it.

    Raises:
        UserError: names the field, its value and what would work.
    """
    experiment = strict(experiment)
    m = experiment.model
    _check_names(experiment)
    _check_model(m, experiment.stages)
    _check_tokenizer(experiment.tokenizer)
    known = [item.name for item in experiment.evals]
    for number, stage in enumerate(experiment.stages):
        _check_stage(stage, m)
        _check_earlier(experiment.stages[:number], stage)
        _check_teacher(experiment, number)
        for name in set(stage.evals) - set(known):
            raise UserError(f"{stage.name}.evals has {name!r}; the experiment's evals are {', '.join(known) or 'none'}")
    makers = [stage.name for stage in experiment.stages if stage.objective.produces == "rows"]
    for item in experiment.evals:
        _check_eval(item, m, makers)
        _check_compared(item, experiment.stages)
    return experiment


def _check_names(experiment: Experiment) -> None:
    names = [stage.name for stage in experiment.stages]
    if not names or len(set(names)) < len(names):
        raise UserError(f"the stages' names are {names}; there should be at least one stage, and no name twice")
    clash = set(names) & {f.name for f in dataclasses.fields(Experiment)}
    if clash:
        raise UserError(f"the stage name {clash.pop()!r} is also a field of the experiment; choose another name")
    evals = [item.name for item in experiment.evals]
    if len(set(evals)) < len(evals):
        raise UserError(f"the evals' names are {evals}; no name should occur twice")


def _check_tokenizer(t: Tokenizer) -> None:
    for name, value in (("typed_control", t.typed_control), ("chat_template", t.chat_template)):
        if value not in ("text", None) and t.path is None:
            raise UserError(
                f"tokenizer.{name} {value} is for a published model's tokenizer; name its folder, tokenizer.path"
            )


def _check_model(m: Model, stages: tuple[Stage, ...]) -> None:
    if len(m.attention_blocks) not in (0, 4) or any(size % 128 for size in m.attention_blocks):
        raise UserError(f"model.attention_blocks is {m.attention_blocks}; it should be four multiples of 128, or empty")
    alike = [name for name in LAYER_FIELDS if m.pattern and getattr(m, name) != getattr(Model, name)]
    if alike:
        raise UserError(
            f"model.{alike[0]} is {getattr(m, alike[0])} and model.pattern is set, whose layers have their own: set "
            f"model.pattern.N.{alike[0]} instead"
        )
    if len(m.pattern) > m.num_layers:
        raise UserError(
            f"model.pattern has {len(m.pattern)} layers; it should have at most model.num_layers, {m.num_layers}"
        )
    for number, layer in enumerate(m.period):
        where = f"model.pattern.{number}" if m.pattern else "model"
        if fault := rope_fault(layer.rope_scaling, layer.rope_theta, m.rotated):
            raise UserError(f"{where}.rope_scaling is {list(layer.rope_scaling)}; {fault}")
    if not m.qk_norm and m.qk_norm_of != Model.qk_norm_of:
        raise UserError(
            f"model.qk_norm_of is {m.qk_norm_of} and model.qk_norm is false; qk_norm should be true, or qk_norm_of {Model.qk_norm_of}"
        )
    if m.num_heads % m.num_kv_heads:
        raise UserError(
            f"model.num_heads is {m.num_heads}; it should be a multiple of model.num_kv_heads, {m.num_kv_heads}"
        )
    if m.head_dim % 2:
        raise UserError(f"model.head_dim is {m.head_dim}; it should be even, since RoPE rotates pairs of dimensions")
    if m.rotated % 2 or m.rotated > m.head_dim:
        raise UserError(f"model.rope_dim is {m.rope_dim}; it should be even, and at most model.head_dim, {m.head_dim}")
    sizes = {"model.head_dim": m.head_dim} | {f"{stage.name}.seq_len": stage.seq_len for stage in stages}
    for name, size in sizes.items():
        if m.attention == "splash" and size % 128:
            raise UserError(
                f"{name} is {size} and model.attention is splash, which needs a multiple of 128; attention auto and plain take any size"
            )
    if m.attention == "cudnn" and m.compute_dtype != "bfloat16":
        raise UserError(
            f"model.compute_dtype is {m.compute_dtype} and model.attention is cudnn, which computes in bfloat16; attention auto and "
            "plain take any dtype"
        )
    if m.attention == "cudnn" and any(layer.softcap for layer in m.period):
        raise UserError(
            "model.softcap or a layer's softcap is set and model.attention is cudnn, which has no soft cap; attention auto and plain have one"
        )


def _check_eval(item: Eval, m: Model, makers: list[str]) -> None:
    _check_made(f"evals.{item.name}.source.path is {item.source.path!r}; the Collect stages are", item.source, makers)
    if item.metric == "best_of_n" and item.temperature != 1:
        raise UserError(
            f"evals.{item.name}.temperature is {item.temperature} and metric is best_of_n, whose KL formula assumes temperature 1: "
            "temperature should be 1"
        )
    if item.metric == "pass_at_k" and item.temperature == 0:
        raise UserError(
            f"evals.{item.name}.temperature is {item.temperature} and metric is pass_at_k; it should be above 0, since greedy "
            "answers are all the same"
        )
    check_environment(f"evals.{item.name}", item.environment, (item.verifier,), item.max_turns)
    if item.environment and item.metric not in ("reward", "pass_at_k", "best_of_n"):
        raise UserError(
            f"evals.{item.name}.environment is {item.environment} and metric is {item.metric}, which does not use it; environment "
            "should be empty"
        )
    if item.asked_as == "chat" and item.metric not in ("choice_accuracy", "continuation_accuracy"):
        raise UserError(
            f"evals.{item.name}.asked_as is chat and metric is {item.metric}, which does not use it; asked_as should be text"
        )
    if item.max_new_tokens >= m.max_len:
        raise UserError(
            f"evals.{item.name}.max_new_tokens is {item.max_new_tokens}; it should be below model.max_len {m.max_len}, which also "
            "has to hold the prompt"
        )


def _check_schedule(stage: Stage) -> None:
    """Check that warmup and wsd's decay fit into the stage's updates; the default warmup may be longer than a short run."""
    if not stage.objective.trains or stage.optimizer.warmup_steps == Optimizer().warmup_steps:
        return
    o, updates = stage.optimizer, stage.steps * updates_per_step(stage)
    whose = f"the updates of {stage.name}.steps {stage.steps}"
    if o.warmup_steps > updates:
        raise UserError(
            f"{stage.name}.optimizer.warmup_steps is {o.warmup_steps}; it should be from 0 to {updates}, {whose}"
        )
    decay = _wsd_decay(stage)
    if o.warmup_steps + decay > updates:
        raise UserError(
            f"{stage.name}.optimizer.warmup_steps is {o.warmup_steps} and decay_frac is {o.decay_frac} ({decay} updates of wsd's "
            f"decay); together they should be at most {updates}, {whose}"
        )


def _wsd_decay(stage: Stage) -> int:
    """The updates of wsd's decay, which are the last of the stage; 0 in other schedules."""
    o = stage.optimizer
    return round(o.decay_frac * stage.steps * updates_per_step(stage)) if o.schedule == "wsd" else 0


def short_warmups(experiment: Experiment) -> list[str]:
    """One line for each stage that ends within the default warmup, so that its learning rate never reaches the peak."""
    lines = []
    for stage in experiment.stages:
        o, updates, decay = stage.optimizer, stage.steps * updates_per_step(stage), _wsd_decay(stage)
        knob = f"{stage.name}.optimizer.warmup_steps {o.warmup_steps}"
        if not stage.objective.trains or o.warmup_steps + decay <= updates:
            continue
        lines.append(
            f"{stage.name}: wsd's decay, the last {decay} of {updates} updates, begins within the warm-up, {knob}: the learning "
            f"rate does not reach peak_lr {o.peak_lr:g}"
            if decay
            else f"{stage.name}: its {updates} updates end within the warm-up, {knob}: the learning rate reaches "
            f"{o.peak_lr * updates / o.warmup_steps:g} of peak_lr {o.peak_lr:g}"
        )
    return lines


def _check_compared(item: Eval, stages: tuple[Stage, ...]) -> None:
    """Raise UserError for an eval that would never be measured, because no stage trains the reward that it needs."""
    scorers = any(stage.objective.produces == "scorer" for stage in stages)
    references = any(stage.objective.learns_preferences for stage in stages)
    if item.metric == "best_of_n" and not scorers:
        raise UserError(
            f"evals.{item.name}.metric is best_of_n, which needs a reward model, and no stage trains one: add a RewardModel stage, "
            "or use metric reward or pass_at_k"
        )
    if item.metric == "pair_accuracy" and not (scorers or references):
        raise UserError(
            f"evals.{item.name}.metric is pair_accuracy, which needs a reward model or the implicit reward of a preference stage, "
            "and the experiment has neither: add such a stage, or remove the eval"
        )


def _check_stage(stage: Stage, model: Model) -> None:
    if stage.seq_len > model.max_len:
        raise UserError(f"{stage.name}.seq_len is {stage.seq_len}; it should be at most model.max_len {model.max_len}")
    if not stage.sources:
        raise UserError(f"{stage.name}.sources is empty: name at least one source of data")
    if not any(source.weight for source in stage.sources):
        raise UserError(f"{stage.name}.sources all have weight 0: at least one should be above 0")
    if len(set(stage.evals)) < len(stage.evals):
        raise UserError(f"{stage.name}.evals is {list(stage.evals)}; it should have each name only once")
    if stage.trainable and not stage.objective.trains:
        raise UserError(
            f"{stage.name}.trainable is {list(stage.trainable)}; it should be empty, since the stage trains nothing"
        )
    if stage.lora.rank and not stage.objective.trains:
        raise UserError(f"{stage.name}.lora.rank is {stage.lora.rank}; it should be 0, since the stage trains nothing")
    if stage.lora.base != "model" and not stage.lora.rank:
        raise UserError(f"{stage.name}.lora.base is {stage.lora.base}, and only an adapter trains on it: set lora.rank")
    _check_schedule(stage)
    rows, together = rows_per_update(stage), rows_per_example(stage)
    if rows % (together * stage.microbatches):
        what = "pairs" if together == 2 else "rows"
        raise UserError(
            f"{stage.name}.microbatches is {stage.microbatches}; it should divide the {rows // together} {what} of an update"
        )
    if stage.objective.samples and stage.objective.max_new_tokens >= stage.seq_len:
        raise UserError(
            f"{stage.name}.objective.max_new_tokens is {stage.objective.max_new_tokens}; it should be below {stage.name}.seq_len "
            f"{stage.seq_len}, which also has to hold the prompt"
        )
    stage.objective.check(stage, model)


def _check_earlier(earlier: tuple[Stage, ...], stage: Stage) -> None:
    """Check that the earlier stages named by a stage exist: its `start`, its reward models and its collected sources."""
    where, kinds = stage.name, {s.name: s.objective for s in earlier}
    speaks = [name for name, kind in kinds.items() if kind.produces == "policy"]
    if stage.start and stage.start not in speaks:
        raise UserError(
            f"{where}.start is {stage.start!r}; earlier stages that train a language model are {_listed(speaks)}"
        )
    scorers = [name for name, kind in kinds.items() if kind.produces == "scorer"]
    for name in reward_names(stage):
        if ":" not in name and name not in scorers:
            raise UserError(
                f"{where}.objective.{stage.objective.reward_model_field} has {name!r}; earlier stages that train a reward model are "
                f"{_listed(scorers)}, and RUN:NAME is a stage of another run"
            )
    makers = [name for name, kind in kinds.items() if kind.produces == "rows"]
    for source in stage.sources:
        _check_made(f"{where} reads {source.path}; the earlier Collect stages are", source, makers)


def _check_teacher(experiment: Experiment, number: int) -> None:
    """Check the stage of this run that a stage learns from: it is an earlier one, and its prompts or its model differ."""
    stage, start = experiment.stages[number], start_of(experiment, number)
    name = stage.objective.teacher_name
    if not name or ":" in name:
        return
    speaks = [s.name for s in experiment.stages[:number] if s.objective.produces == "policy"]
    if name not in speaks:
        raise UserError(
            f"{stage.name}.objective.teacher is {name!r}; earlier stages that train a language model are {_listed(speaks)}, and "
            "RUN:NAME is a stage of another run, hf:FOLDER or gguf:FILE open weights"
        )
    if start is not None and name == experiment.stages[start].name:
        raise UserError(
            f"{stage.name}.objective.teacher is {name!r}, the stage that {stage.name} starts from: leave teacher empty, set "
            "teacher_prompt, or name another stage"
        )


def _check_made(what: str, source: Source, makers: list[str]) -> None:
    if source.path.startswith(COLLECTED) and source.path.removeprefix(COLLECTED) not in makers:
        raise UserError(f"{what} {_listed(makers)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
