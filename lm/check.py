"""Everything about an experiment that can be wrong without looking at data or devices: `check` says what, in one line."""

from __future__ import annotations

import dataclasses

from lm.experiment import (
    CPO,
    DPO,
    GRPO,
    KTO,
    MADE,
    PPO,
    Collect,
    Eval,
    Experiment,
    Model,
    Optimizer,
    Preference,
    RewardModel,
    Source,
    Speechless,
    Stage,
    UserError,
    reward_names,
    rows_per_update,
    rows_together,
    strict,
    updates_per_step,
)
from lm.user_functions import is_function_name

SMOOTHED = frozenset(
    {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"}
)  # they read label_smoothing
WHOLE_BATCH = frozenset({"aot", "aot_unpaired"})  # they rank the pairs of a batch


def check(experiment: Experiment) -> Experiment:
    """The experiment, read strictly, if nothing is wrong with it that shows without looking at data or devices.

    Raises:
        UserError: names the field, its value and what would work.
    """
    experiment = strict(experiment)
    m = experiment.model
    _check_names(experiment)
    _check_model(m, experiment.stages)
    known = [item.name for item in experiment.evals]
    for number, stage in enumerate(experiment.stages):
        _check_stage(stage, m)
        _check_earlier(experiment.stages[:number], stage)
        for name in set(stage.evals) - set(known):
            raise UserError(
                f"{stage.name}.evals names {name!r}; the experiment's evals are {', '.join(known) or 'none'}"
            )
    makers = [stage.name for stage in experiment.stages if isinstance(stage.objective, Collect)]
    for item in experiment.evals:
        _check_eval(item, m, makers)
        _check_compared(item, experiment.stages)
    return experiment


def _check_names(experiment: Experiment) -> None:
    names = [stage.name for stage in experiment.stages]
    if not names or len(set(names)) < len(names):
        raise UserError(f"stages need distinct names, at least one; there are {names}")
    clash = set(names) & {f.name for f in dataclasses.fields(Experiment)}
    if clash:
        raise UserError(f"stage name {clash.pop()!r} is taken by a field of the experiment: choose another")
    evals = [item.name for item in experiment.evals]
    if len(set(evals)) < len(evals):
        raise UserError(f"evals need distinct names; there are {evals}")


def _check_model(m: Model, stages: tuple[Stage, ...]) -> None:
    if len(m.attention_blocks) not in (0, 4) or any(size % 128 for size in m.attention_blocks):
        raise UserError(f"model.attention_blocks is {m.attention_blocks}; it should be four multiples of 128, or empty")
    if len(m.rope_scaling) not in (0, 4):
        raise UserError(f"model.rope_scaling has {len(m.rope_scaling)} numbers; it should have 4, or none")
    if m.rope_scaling and m.rope_scaling[1] >= m.rope_scaling[2]:
        raise UserError(
            f"model.rope_scaling is {list(m.rope_scaling)}; its second number, the low frequency factor, should be below "
            "the third, the high one"
        )
    if m.num_heads % m.num_kv_heads:
        raise UserError(f"model.num_heads {m.num_heads} is not a multiple of model.num_kv_heads {m.num_kv_heads}")
    if m.head_dim % 2:
        raise UserError(f"model.head_dim {m.head_dim} is odd; rope turns pairs")
    sizes = {"model.head_dim": m.head_dim} | {f"{stage.name}.seq_len": stage.seq_len for stage in stages}
    for name, size in sizes.items():
        if m.attention == "splash" and size % 128:
            raise UserError(f"{name} is {size}; model.attention splash needs a multiple of 128 (auto, plain take any)")


def _check_eval(item: Eval, m: Model, makers: list[str]) -> None:
    _check_made(
        f"evals.{item.name}.source.path is {item.source.path!r}; stages that make rows are", item.source, makers
    )
    if item.metric == "best_of_n" and item.temperature != 1:
        raise UserError(
            f"evals.{item.name}.temperature is {item.temperature}; it should be 1 for best_of_n, of which the KL is known"
        )
    if item.metric == "pass_at_k" and item.temperature == 0:
        raise UserError(
            f"evals.{item.name}.temperature is {item.temperature}; it should be above 0 for pass_at_k, or all answers are "
            "the same"
        )
    if item.max_new_tokens >= m.max_len:
        raise UserError(
            f"evals.{item.name}.max_new_tokens {item.max_new_tokens} leaves no room for a prompt in model.max_len {m.max_len}"
        )


def _check_schedule(stage: Stage) -> None:
    """The warm-up, and the decay of wsd after it, fit into the stage's updates; a short run may end within the default one."""
    if isinstance(stage.objective, Collect) or stage.optimizer.warmup_steps == Optimizer().warmup_steps:
        return
    o, updates = stage.optimizer, stage.steps * updates_per_step(stage)
    whose = f"the updates of {stage.name}.steps {stage.steps}"
    if o.warmup_steps > updates:
        raise UserError(
            f"{stage.name}.optimizer.warmup_steps is {o.warmup_steps}; it should be from 0 to {updates}, {whose}"
        )
    decay = round(o.decay_frac * updates) if o.schedule == "wsd" else 0
    if o.warmup_steps + decay > updates:
        raise UserError(
            f"{stage.name}.optimizer.warmup_steps is {o.warmup_steps} and decay_frac {o.decay_frac}, {decay} updates of wsd's "
            f"decay; together they should be at most {updates}, {whose}"
        )


def short_warmups(experiment: Experiment) -> list[str]:
    """A line for every stage whose learning rate never reaches its peak: of the default warm-up, which is not refused."""
    lines = []
    for stage in experiment.stages:
        warmup, updates = stage.optimizer.warmup_steps, stage.steps * updates_per_step(stage)
        if warmup > updates and not isinstance(stage.objective, Collect):
            lines.append(
                f"{stage.name}: its {updates} updates end within the warm-up, {stage.name}.optimizer.warmup_steps {warmup}: "
                f"the learning rate reaches {stage.optimizer.peak_lr * updates / warmup:g} of peak_lr {stage.optimizer.peak_lr:g}"
            )
    return lines


def _check_compared(item: Eval, stages: tuple[Stage, ...]) -> None:
    """Raise UserError for an eval that no stage gives what it compares with: it would never be measured."""
    scorers = any(isinstance(stage.objective, RewardModel) for stage in stages)
    references = any(isinstance(stage.objective, Preference) for stage in stages)
    if item.metric == "best_of_n" and not scorers:
        raise UserError(
            f"evals.{item.name}.metric is best_of_n, and no stage trains the reward model that chooses: add one, or take "
            "metric reward or pass_at_k"
        )
    if item.metric == "pair_accuracy" and not (scorers or references):
        raise UserError(
            f"evals.{item.name}.metric is pair_accuracy, and no stage trains a reward model or learns preferences: there is "
            "no reward to compare the answers by; add such a stage, or remove the eval"
        )


def _check_stage(stage: Stage, model: Model) -> None:
    if stage.seq_len > model.max_len:
        raise UserError(f"{stage.name}.seq_len {stage.seq_len} is longer than model.max_len {model.max_len}")
    if not stage.sources:
        raise UserError(f"{stage.name}.sources is empty: name at least one source of data")
    if not any(source.weight for source in stage.sources):
        raise UserError(f"{stage.name}.sources all have weight 0: at least one should be above 0")
    if len(set(stage.evals)) < len(stage.evals):
        raise UserError(f"{stage.name}.evals is {list(stage.evals)}; it should have each name once")
    _check_schedule(stage)
    rows, together = rows_per_update(stage), rows_together(stage)
    if rows % (together * stage.microbatches):
        what = "pairs" if together == 2 else "rows"
        raise UserError(f"{stage.name}.microbatches {stage.microbatches} does not divide its {rows // together} {what}")
    if isinstance(stage.objective, DPO | CPO):
        _check_smoothing(stage, stage.objective)
    if isinstance(stage.objective, DPO):
        _check_dpo(stage, stage.objective)
    if isinstance(stage.objective, CPO) and stage.objective.alpha and stage.objective.loss != "simpo":
        raise UserError(
            f"{stage.name}.objective.alpha is {stage.objective.alpha} and loss is {stage.objective.loss}; "
            "alpha shapes the reward of simpo: it should be 0, or loss simpo"
        )
    if isinstance(stage.objective, KTO) and stage.batch_size < 2:
        raise UserError(
            f"{stage.name}.batch_size is {stage.batch_size}; KTO pairs each prompt with another answer of its batch: "
            "it should be at least 2"
        )
    if isinstance(stage.objective, KTO) and not stage.objective.desirable_weight + stage.objective.undesirable_weight:
        raise UserError(
            f"{stage.name}.objective has desirable_weight 0 and undesirable_weight 0: one of them should be above 0"
        )
    if isinstance(stage.objective, GRPO | PPO | Collect) and stage.objective.max_new_tokens >= stage.seq_len:
        raise UserError(
            f"{stage.name}.objective.max_new_tokens {stage.objective.max_new_tokens} leaves no room for a prompt in "
            f"{stage.name}.seq_len {stage.seq_len}"
        )
    if isinstance(stage.objective, RewardModel):
        layers = stage.objective.layers
        if layers > model.num_layers:
            raise UserError(
                f"{stage.name}.objective.layers is {layers}; it should be from 0 to model.num_layers {model.num_layers}"
            )
    if isinstance(stage.objective, PPO):
        _check_ppo(stage, stage.objective)
    if isinstance(stage.objective, Collect):
        _check_collect(stage, stage.objective)
    if isinstance(stage.objective, GRPO):
        o = stage.objective
        if stage.batch_size * o.group_size % o.updates_per_rollout:
            raise UserError(
                f"{stage.name}.objective.updates_per_rollout {o.updates_per_rollout} does not divide its {stage.batch_size * o.group_size} completions"
            )


def _check_smoothing(stage: Stage, o: DPO | CPO) -> None:
    losses, readers = ((o.loss,), {"sigmoid", "simpo"}) if isinstance(o, CPO) else (o.losses, SMOOTHED)
    if o.label_smoothing and readers.isdisjoint(losses) and not any(map(is_function_name, losses)):
        raise UserError(
            f"{stage.name}.objective.label_smoothing is {o.label_smoothing}, which {', '.join(losses)} does not read; "
            f"it should be 0, or the loss one of {', '.join(sorted(readers))}"
        )


def _check_dpo(stage: Stage, o: DPO) -> None:
    where = f"{stage.name}.objective"
    if not o.losses or len(set(o.losses)) < len(o.losses):
        raise UserError(f"{where}.losses is {list(o.losses)}; it should be rows of the DPO table, each once")
    if o.loss_weights and len(o.loss_weights) != len(o.losses):
        raise UserError(
            f"{where}.loss_weights has {len(o.loss_weights)} numbers and losses {len(o.losses)} rows; "
            "it should have one for each, or none"
        )
    if o.loss_weights and not any(o.loss_weights):
        raise UserError(f"{where}.loss_weights is {list(o.loss_weights)}; at least one should be above 0")
    ranked = sorted(WHOLE_BATCH.intersection(o.losses))
    if ranked and stage.microbatches > 1:
        raise UserError(
            f"{stage.name}.microbatches is {stage.microbatches}, and {ranked[0]} ranks all pairs of a batch: "
            "it should be 1, or the loss another"
        )


def _check_earlier(earlier: tuple[Stage, ...], stage: Stage) -> None:
    """What a stage names of those before it: where it starts, reward models, what others have collected."""
    where, kinds = stage.name, {s.name: s.objective for s in earlier}
    speaks = [name for name, kind in kinds.items() if not isinstance(kind, Speechless)]
    if stage.start and stage.start not in speaks:
        raise UserError(
            f"{where}.start is {stage.start!r}; earlier stages that train a language model are {_listed(speaks)}"
        )
    scorers = [name for name, kind in kinds.items() if isinstance(kind, RewardModel)]
    for name in reward_names(stage):
        if ":" not in name and name not in scorers:
            raise UserError(
                f"{where}.objective.{'reward_models' if isinstance(stage.objective, PPO) else 'judge'} names the reward model "
                f"{name!r}; those before it are {_listed(scorers)}; RUN:NAME is another run's"
            )
    makers = [name for name, kind in kinds.items() if isinstance(kind, Collect)]
    for source in stage.sources:
        _check_made(f"{where} reads {source.path}; the stages before it that make rows are", source, makers)


def _check_made(what: str, source: Source, makers: list[str]) -> None:
    if source.path.startswith(MADE) and source.path.removeprefix(MADE) not in makers:
        raise UserError(f"{what} {_listed(makers)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _check_ppo(stage: Stage, o: PPO) -> None:
    if not o.reward_models and not o.verifier:
        raise UserError(
            f"{stage.name}.objective has neither reward_models nor a verifier: name a reward model's stage, or a row of the "
            "verifier table"
        )
    if stage.batch_size % o.minibatches:
        raise UserError(
            f"{stage.name}.objective.minibatches {o.minibatches} does not divide its {stage.batch_size} answers"
        )


def _check_collect(stage: Stage, o: Collect) -> None:
    where = f"{stage.name}.objective"
    if not o.judge and not o.verifier:
        raise UserError(f"{where} has no judge: set judge to a reward model's stage or to people, or name a verifier")
    if o.judge == "people" and o.make == "best":
        raise UserError(f"{where}.make is best and judge people, who compare answers and give no numbers: make pairs")
