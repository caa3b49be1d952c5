"""Loads reward models, of the run itself or of another one."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import jax

from lm.config.objective import ObjectiveConfig
from lm.data.text_tokenizer import TextTokenizer
from lm.data.vocabulary import load_tokenizer
from lm.experiment import (
    Experiment,
    UserError,
    from_dict,
    reward_names,
    start_of,
)
from lm.model.heads import Scorer
from lm.model.lora import adapted, freeze_adapter
from lm.parallel.distributed import broadcast_from_main
from lm.train.base import Known
from lm.train.checkpoint import Checkpoints
from lm.train.models import NONE_KNOWN, StoredRun, restore_model, stage_index, traced_model
from lm.train.run_folder import RunFolder


def load_scorer(
    run: StoredRun,
    stage: str,
    known: Known = NONE_KNOWN,
) -> Scorer:
    """Load a stage's reward model: of the last step if the stage is finished, else of the newest checkpoint.

    Raises:
        UserError: there is no such stage, it trains no reward model, or it has no checkpoint.
    """
    experiment = run.experiment
    layers = _scorer_stage(experiment, run.folder, stage).trained_model(experiment.model).num_layers
    index = stage_index(experiment, stage)

    def make() -> Scorer:
        before = traced_model(run, start_of(experiment, index))
        new = Scorer(freeze_adapter(before), jax.random.key(0), layers)
        return adapted(new, experiment.stages[index], jax.random.key(0), "reward")

    of_base = functools.partial(Scorer, key=None, layers=layers)
    return restore_model(run, index, "reward", jax.eval_shape(make), of_base, known).items["reward"]


def scorers_for(
    run: StoredRun,
    names: tuple[str, ...],
    known: Known = NONE_KNOWN,
) -> tuple[Scorer, ...]:
    """Load reward models by name: STAGE of this run, or RUN:STAGE of another run's folder.

    Raises:
        UserError: there is no such reward model, or it has another tokenizer than this run.
    """
    found = []
    for name in names:
        other, _, stage = name.rpartition(":")
        if other:
            theirs = _experiment_with_same_tokenizer(name, run.tokenizer)
            found.append(load_scorer(replace(run, experiment=theirs, folder=RunFolder(Path(other))), stage))
        else:
            found.append(load_scorer(run, stage, known))
    return tuple(found)


def scorers_before(
    run: StoredRun,
    index: int,
    known: Known = NONE_KNOWN,
) -> tuple[Scorer, ...]:
    """The reward models that stage `index` reads; if none, the last one trained before it (for evals), if any."""
    names = reward_names(run.experiment.stages[index])
    earlier = [s.name for s in run.experiment.stages[: index + 1] if s.objective.produces == "scorer"]
    ready = broadcast_from_main(lambda: [name for name in earlier if run.folder.finished(name)])
    return scorers_for(run, names or tuple(ready[-1:]), known)


def check_reward_models(experiment: Experiment, tokenizer: TextTokenizer) -> None:
    """Check the reward models that the experiment takes from other runs, before anything is trained.

    Raises:
        UserError: there is no such run or stage, it has no checkpoint, or its tokenizer is not this run's.
    """
    for name in dict.fromkeys(name for stage in experiment.stages for name in reward_names(stage) if ":" in name):
        run, _, stage = name.rpartition(":")
        _scorer_stage(_experiment_with_same_tokenizer(name, tokenizer), RunFolder(Path(run)), stage)
        if not Checkpoints(RunFolder(Path(run)).checkpoints(stage)).steps():
            raise UserError(f"{run} has no checkpoint of stage {stage!r} yet: `lm run` trains it")


def _experiment_with_same_tokenizer(name: str, tokenizer: TextTokenizer) -> Experiment:
    """The experiment of the run of a reward model RUN:STAGE. Raises UserError unless it has the same tokenizer."""
    other = RunFolder(Path(name.rpartition(":")[0]))
    experiment = from_dict(other.read_experiment())
    theirs = load_tokenizer(other.tokenizer)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the reward model {name} has another tokenizer ({theirs.vocab_size} pieces) than this run "
            f"({tokenizer.vocab_size}): its scores would be meaningless; use its tokenizer for this run, "
            f"--tokenizer.path {other.tokenizer}"
        )
    return experiment


def _scorer_stage(experiment: Experiment, folder: RunFolder, stage: str) -> ObjectiveConfig:
    kinds = {s.name: s.objective for s in experiment.stages}
    found = kinds.get(stage)
    if found is None or found.produces != "scorer":
        trained = ", ".join(name for name, kind in kinds.items() if kind.produces == "scorer") or "none"
        raise UserError(f"{folder.path} has no reward model {stage!r}; its stages of reward models are {trained}")
    return found
